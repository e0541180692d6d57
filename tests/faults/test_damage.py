"""Bits that flip, pages that vanish, files that are cut: nothing is altered, and no loss is hidden."""

import os
import random
import shutil
import sqlite3
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner

from perqueue import FlushTimeout, OutboxError, PerQueue, PerQueueError
from perqueue._activity import Event, Settlement, checksum
from perqueue._outbox import OperatorOutbox, claims, examine
from perqueue.cli import main
from tests.faults._rounds import rounds

ROUNDS = rounds(17, 34)
"""For each of six kinds of damage: 200 and more in a long round."""
PAGE = 1024
NOW = 1_700_000_000_000
PATIENCE = 20.0
"""Seconds for a delivery on a busy machine; one that is stuck says so at once."""


@dataclass
class Original:
    """An outbox with a history, before it is damaged."""

    folder: Path
    recorded: dict[int, tuple[str, str]] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    cells: dict[int, bytes] = field(default_factory=dict)

    def copy(self, target, file):
        """Put the closed outbox, or one whose latest half is in its -wal, at a path."""
        shutil.copy(self.folder / f"{file}.db", target)
        if file == "wal":
            shutil.copy(self.folder / "wal.db-wal", f"{target}-wal")
        return Path(f"{target}-wal") if file == "wal" else target

    def legible(self, path):
        """Return the pending ones whose every byte is somewhere in the files."""
        content = path.read_bytes()
        wal = Path(f"{path}-wal")
        content += wal.read_bytes() if wal.exists() else b""
        return {i for i in self.pending if self.cells[i] in content}


def cell(activity_id, billing_id, user_id, kind, recorded_at):
    """Return the bytes of a small row in a page, by SQLite's documentation of its file format."""
    texts = [text.encode() for text in (billing_id, user_id, kind)]
    check = checksum(billing_id, user_id, kind, recorded_at)
    size = next(n for n in (1, 2, 3, 4, 6) if check < 1 << (8 * n - 1))
    header = bytes([7, 0, *(13 + 2 * len(text) for text in texts), 5, {6: 5}.get(size, size)])
    header = bytes([len(header)]) + header[1:]
    body = header + b"".join(texts) + recorded_at.to_bytes(6) + check.to_bytes(size)
    number = (
        bytes([activity_id]) if activity_id < 128 else bytes([activity_id >> 7 | 0x80, activity_id & 0x7F])
    )
    return bytes([len(body)]) + number + body


@pytest.fixture
def original(per, tmp_path):
    """Activities that are delivered, refused, waiting and pending: closed in one file, and with a -wal."""
    folder = tmp_path / "original"
    folder.mkdir()
    made = Original(folder)
    path = folder / "wal.db"
    with closing(OperatorOutbox(path, per.url)) as outbox:
        _record(outbox, made, 150)
        for activity in outbox.claim(0, 100):
            _settle(outbox, activity)
        made.pending = {7, 14, *range(101, 151)}
        outbox.requeue([7, 14])
    with closing(OperatorOutbox(path, per.url)) as outbox:
        _record(outbox, made, 110)
        for activity in outbox.claim(100, 30):
            _settle(outbox, activity)
        made.pending |= set(range(151, 261))
        made.pending -= set(range(101, 131))
        shutil.copy(path, folder / "live.db")
        shutil.copy(f"{path}-wal", folder / "live.db-wal")
    shutil.copy(path, folder / "db.db")
    (folder / "live.db").rename(path)
    (folder / "live.db-wal").rename(f"{path}-wal")
    whole = path.read_bytes() + Path(f"{path}-wal").read_bytes()
    assert all(made.cells[i] in whole for i in made.pending if i % 40)
    return made


def _record(outbox, made, count):
    for _ in range(count):
        n = len(made.recorded) + 1
        user = f"USER_{n}" if n % 40 else f"USER_{n}_" + "x" * 380
        group = "GROUP" if n % 40 else "GROUP_" + "y" * 390
        kind = "TYPE" if n % 40 else "TYPE_" + "z" * 390  # these have an overflow page
        assert outbox.append(group, user, kind, NOW + n) == n
        made.recorded[n] = (group, user)
        made.cells[n] = cell(n, group, user, kind, NOW + n) if n % 40 else b"never found in one piece"


def _settle(outbox, activity):
    refused = activity.id % 7 == 0
    settlement = Settlement(
        activity=activity,
        event=Event.REJECT if refused else Event.ACCEPT,
        answered_at=NOW + 60_000,
        transaction_id=None if refused else f"T{activity.id}",
        reason="a reason" if refused else None,
    )
    outbox.settle([settlement], drained_through=activity.id, refusals=(0, None))


def flip_bits(file, rng):
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 8, 64])):
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def spoil_a_page(file, rng):
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content) - PAGE)
    start -= rng.choice([0, start % PAGE])
    content[start : start + PAGE] = bytes(PAGE) if rng.random() < 0.5 else rng.randbytes(PAGE)
    file.write_bytes(content)


def cut(file, rng):
    with file.open("r+b") as opened:
        opened.truncate(rng.randrange(1, file.stat().st_size))


def flush(queue, patience, enough=lambda: False):
    """Flush; do not wait for what the file's damage makes impossible, nor longer than for enough."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return queue.flush(0.5)
        except FlushTimeout as error:
            if "perqueue doctor" in str(error) or enough() or time.monotonic() >= deadline:
                raise


class Delivery:
    """One program that delivers what is in an outbox, and what came of it."""

    def __init__(self, per, options, path, patience=PATIENCE, enough=float("inf")):
        before = len(per.activities)
        began = time.monotonic()
        self.error = None
        self.damaged = 0
        try:
            queue = PerQueue(path, **options)
            try:
                flush(queue, patience, lambda: len(per.activities) - before >= enough)
            finally:
                try:
                    self.damaged = queue.stats().damaged
                finally:
                    queue.close()
        except PerQueueError as error:
            self.error = error
        self.took = time.monotonic() - began
        self.sent = [(activity.billing_id, activity.user_id) for activity in per.activities[before:]]

    def altered(self, made):
        """Return what was sent and never recorded."""
        return set(self.sent) - set(made.recorded.values())

    def undelivered(self, made, ids):
        sent = set(self.sent)
        return {i for i in ids if made.recorded[i] not in sent}


def doctor(path, *arguments):
    result = CliRunner().invoke(main, ["doctor", "--offline", "--outbox", str(path), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rescue(path, rescued, url, legible):
    """Salvage an outbox; there is no new file only if nothing at all can be read. Tell whether there is."""
    result = doctor(path, "--salvage", rescued, "--base-url", url)
    if result.exit_code:
        assert (result.exit_code, legible, rescued.exists()) == (1, set(), False)
        assert "nothing of an outbox could be found" in result.stderr
    return result.exit_code == 0


KINDS = [(file, damage) for file in ("db", "wal") for damage in (flip_bits, spoil_a_page, cut)]


@pytest.mark.timeout(rounds(120, 1200))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1].__name__}")
def test_damage_alters_nothing_and_hides_nothing(per, options, original, tmp_path, monkeypatch, kind):
    """Whatever is damaged, only what was recorded is sent, a loss is told, and the rest can be rescued."""
    monkeypatch.setattr(examine, "_openers_of", lambda _: set())  # a look at each file of each process
    file, damage = kind
    seen = set()
    for seed in range(ROUNDS):
        rng = random.Random(f"{file} {damage.__name__} {seed}")
        path = tmp_path / f"{seed}.db"
        damage(original.copy(path, file), rng)
        legible = original.legible(path)
        patient = tmp_path / f"{seed}-patient.db"
        shutil.copy(path, patient)
        if file == "wal":
            shutil.copy(f"{path}-wal", f"{patient}-wal")

        live = Delivery(per, options, path)
        assert live.altered(original) == set(), seed
        assert live.took < PATIENCE + 15, seed
        lost = live.undelivered(original, original.pending)
        told = live.error is not None or live.damaged > 0
        if file == "db":  # the end of a -wal can be lost without a trace
            assert told or not lost, (seed, sorted(lost))
        if isinstance(live.error, OutboxError | FlushTimeout):
            assert "perqueue doctor" in str(live.error), (seed, live.error)

        verdict = doctor(patient)
        assert verdict.exit_code == 1 or not (told or lost), (seed, verdict.output)

        rescued = tmp_path / f"{seed}-rescued.db"
        if not rescue(patient, rescued, per.url, legible):
            continue
        saved = Delivery(per, options, rescued)
        assert saved.altered(original) == set(), seed
        assert saved.undelivered(original, legible) == set(), seed
        assert saved.error is None or saved.damaged, (seed, saved.error)
        if file == "db":  # what the program did meanwhile has spoiled nothing
            afterwards = tmp_path / f"{seed}-afterwards.db"
            assert rescue(path, afterwards, per.url, legible)
            rest = Delivery(per, options, afterwards)
            assert rest.altered(original) == set(), seed
            missed = live.undelivered(original, legible) & rest.undelivered(original, legible)
            assert missed == set(), seed
        seen.add((told, bool(lost)))
    print(file, damage.__name__, seen)


def test_control_an_unchecked_row_would_be_sent_altered(per, options, original, tmp_path, monkeypatch):
    """The test above sees an altered activity, if checksums are not looked at."""
    path = tmp_path / "0.db"
    file = original.copy(path, "db")
    content = file.read_bytes()
    assert content.count(b"GROUPUSER_259TYPE") == 1
    file.write_bytes(content.replace(b"GROUPUSER_259TYPE", b"GROUPLSER_259TYPE"))
    copy = tmp_path / "1.db"
    shutil.copy(path, copy)
    assert Delivery(per, options, copy).altered(original) == set()
    monkeypatch.setattr(claims, "checksum", lambda *_: _Whatever())
    unchecked = Delivery(per, options, path, enough=len(original.pending))  # one is never settled
    assert unchecked.altered(original) == {("GROUP", "LSER_259")}


class _Whatever:
    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


def test_damage_under_a_running_queue_is_no_surprise(per, options, original, tmp_path):
    """A file that is damaged while it is in use is an OutboxError at worst; what is sent was recorded."""
    for seed in range(rounds(10, 100)):
        rng = random.Random(f"running {seed}")
        path = tmp_path / f"{seed}.db"
        original.copy(path, rng.choice(["db", "wal"]))
        before = len(per.activities)
        with path.open("r+b") as file, ExitStack() as stack:
            # Closed after the queues are: that drops all locks that this process has on the file.
            queue = PerQueue(path, **options, drain=False)
            stack.callback(queue.close)
            queue.record("GROUP", "LATER_0")
            target = file if rng.random() < 0.5 else stack.enter_context(Path(f"{path}-wal").open("r+b"))
            size = os.fstat(target.fileno()).st_size
            if seed % 5:
                start = rng.randrange(size)
                os.pwrite(target.fileno(), rng.randbytes(rng.choice([1, 20, 1000])), start)
            else:
                os.ftruncate(target.fileno(), rng.randrange(size))
            stack.enter_context(suppress(PerQueueError))
            for n in range(1, 4):
                with suppress(OutboxError):
                    queue.record("GROUP", f"LATER_{n}")
            drain = PerQueue(path, **options)
            stack.callback(drain.close)
            began = time.monotonic()
            try:
                flush(drain, 5)
            finally:
                assert time.monotonic() - began < PATIENCE + 15, seed
        sent = {(activity.billing_id, activity.user_id) for activity in per.activities[before:]}
        assert sent <= {*original.recorded.values(), *(("GROUP", f"LATER_{n}") for n in range(4))}, seed


def test_a_page_that_cannot_be_read_holds_up_nobody(per, options, original, tmp_path):
    """Of a page that is gone, the rows are counted as damaged; those before and behind it are delivered."""
    path = tmp_path / "0.db"
    content = bytearray(original.copy(path, "db").read_bytes())
    start = content.index(b"GROUPUSER_215TYPE") // PAGE * PAGE
    content[start : start + PAGE] = bytes(PAGE)
    path.write_bytes(content)
    gone = original.pending - original.legible(path) - set(range(40, 300, 40))
    assert 215 in gone
    queue = PerQueue(path, **options)
    try:
        queue.record("GROUP", "LATER")
        with pytest.raises(OutboxError, match="perqueue doctor"):
            queue.flush(20)
        assert queue.stats().pending == 0
        assert queue.stats().damaged == len(gone)
        queue.record("GROUP", "LATEST")
        queue.flush(20)
    finally:
        queue.close()
    sent = {activity.user_id for activity in per.activities}
    wanted = {original.recorded[i][1] for i in original.pending - gone} | {"LATER", "LATEST"}
    assert sent == wanted


def test_a_wrong_watermark_hides_nothing(per, options, original, tmp_path):
    """What is pending below a watermark that was damaged is delivered all the same."""
    path = original.copy(tmp_path / "0.db", "db")
    change(path, "UPDATE perqueue_drain SET drained_through = 250")
    live = Delivery(per, options, path, patience=1)  # until the next start, some may have to wait
    later = Delivery(per, options, path)
    missed = live.undelivered(original, original.pending) & later.undelivered(original, original.pending)
    assert missed == set()
    assert later.error is None


def test_a_row_that_vanished_is_told(per, options, original, tmp_path):
    """If the counters know of an activity that is not in the file, flush() says so."""
    path = original.copy(tmp_path / "0.db", "db")
    change(path, "DELETE FROM perqueue_activity WHERE id = 200")
    live = Delivery(per, options, path)
    assert live.undelivered(original, original.pending) == {200}
    assert isinstance(live.error, OutboxError)
    assert live.damaged == 1
    assert isinstance(Delivery(per, options, path).error, OutboxError)  # and so does the next program
    assert "counters and tables do not agree" in doctor(path).output


def test_an_outcome_of_another_does_not_hide_a_pending_one(per, options, original, tmp_path):
    """An outcome whose number went wrong is not taken for that of the activity that has this number."""
    path = original.copy(tmp_path / "0.db", "db")
    change(path, "UPDATE perqueue_settlement SET activity_id = 200 WHERE activity_id = 61")
    rescued = tmp_path / "1.db"
    doctor(path, "--salvage", rescued)
    for each in (path, rescued):
        delivery = Delivery(per, options, each, enough=len(original.pending))
        assert delivery.undelivered(original, original.pending) == set()


def test_a_damaged_outcome_is_not_told(original, tmp_path):
    """An outcome that does not match its checksum is not passed on, and moves nothing."""
    path = original.copy(tmp_path / "0.db", "db")
    change(path, "UPDATE perqueue_settlement SET state = 1 WHERE activity_id = 21")
    change(path, "UPDATE perqueue_settlement SET transaction_id = 'X' WHERE activity_id = 22")
    change(path, "UPDATE perqueue_settlement SET reason = 'X' WHERE activity_id = 28")
    with closing(OperatorOutbox(path, None, create=False)) as outbox:
        assert sorted(outbox.settled(range(20, 30))) == [20, 23, 24, 25, 26, 27, 29]
        assert outbox.requeue([28]) == outbox.discard([28]) == 0
        while outbox.prune(2**62, 0, 50):
            pass
    left = change(path, "SELECT activity_id FROM perqueue_settlement WHERE activity_id BETWEEN 20 AND 30")
    assert [i for (i,) in left] == [21, 22, 28]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM perqueue_activity WHERE id > 90",  # the next one would get an ID that has an outcome
        "DELETE FROM perqueue_drain",
        "DELETE FROM perqueue_outbox",
        "DROP TABLE perqueue_retry",
        "DROP TABLE perqueue_settlement",
        "UPDATE perqueue_drain SET accepted = 1000000",
        "UPDATE perqueue_drain SET hold = 'retry_after', hold_reason = NULL, hold_until = 0",
        "UPDATE perqueue_drain SET hold = 'retry_after', hold_reason = 'x', hold_until = 9000000000000000000",
    ],
)
def test_a_file_that_cannot_be_right_is_not_used(per, options, original, tmp_path, statement):
    """What makes no sense is an OutboxError that names `perqueue doctor`, and everything can be rescued."""
    path = original.copy(tmp_path / "0.db", "db")
    change(path, statement)
    live = Delivery(per, options, path)
    assert isinstance(live.error, OutboxError)
    assert "perqueue doctor" in str(live.error)
    assert not live.sent
    assert doctor(path).exit_code == 1
    rescued = tmp_path / "1.db"
    assert doctor(path, "--salvage", rescued).exit_code == 0
    lost = set(range(91, 261)) if "perqueue_activity" in statement else set()
    assert Delivery(per, options, rescued).undelivered(original, original.pending) <= lost


def test_a_running_queue_notices_that_numbers_come_again(options, original, tmp_path):
    """record() raises when the highest rows are gone: its activity would seem to be delivered already."""
    path = original.copy(tmp_path / "0.db", "db")
    queue = PerQueue(path, **{**options, "drain": False})
    try:
        assert queue.record("GROUP", "USER").id == 261
        change(path, "DELETE FROM perqueue_activity WHERE id > 90")
        with pytest.raises(OutboxError, match="perqueue doctor"):
            queue.record("GROUP", "USER")
    finally:
        queue.close()


def test_an_emptied_file_is_not_taken_for_a_new_one(per, options, original, tmp_path):
    """A file cut to nothing is refused while its -wal is there, and that is rescued."""
    path = tmp_path / "0.db"
    original.copy(path, "wal")
    path.write_bytes(b"")
    legible = original.legible(path)
    assert legible
    for create in (True, False):
        with pytest.raises(OutboxError, match="perqueue doctor"):
            OperatorOutbox(path, per.url, create=create)
    assert doctor(path).exit_code == 1
    rescued = tmp_path / "1.db"
    assert doctor(path, "--salvage", rescued).exit_code == 0
    assert Delivery(per, options, rescued).undelivered(original, legible) == set()


SPOILT = [(place, filler) for place in (slice(56, 60), slice(32), slice(1024)) for filler in (b"\0", b"U")]


@pytest.mark.parametrize("spoilt", SPOILT, ids=str)
def test_a_salvage_reads_on_behind_a_damaged_frame(per, options, original, tmp_path, spoilt):
    """SQLite forgets what follows a damaged place in the -wal; `perqueue doctor` says so, and rescues it."""
    path = tmp_path / "0.db"
    wal = original.copy(path, "wal")
    content = bytearray(wal.read_bytes())
    place, filler = spoilt
    content[place] = filler * len(content[place])
    wal.write_bytes(content)
    verdict = doctor(path)
    assert "write-ahead log cannot be read by SQLite" in verdict.output
    assert verdict.exit_code == 1
    rescued = tmp_path / "1.db"
    doctor(path, "--salvage", rescued)
    assert Delivery(per, options, rescued).undelivered(original, original.pending) == set()
    assert Delivery(per, options, path).undelivered(original, original.pending)  # what README and docs say


def test_what_was_pruned_does_not_come_back(per, original, tmp_path):
    """Activities that were delivered and deleted stay so, though their old pages may still hold them."""
    path = tmp_path / "0.db"
    original.copy(path, "db")
    with closing(OperatorOutbox(path, None, create=False)) as outbox:
        while outbox.prune(2**62, 0, 50):
            pass
        position = outbox.position()
    rescued = tmp_path / "1.db"
    doctor(path, "--salvage", rescued)
    with closing(OperatorOutbox(rescued, None, create=False)) as outbox:
        after = outbox.position()
    assert (after.pending, after.accepted, after.rejected) == (
        position.pending, position.accepted, position.rejected
    )  # fmt: skip
    assert after.damaged == 0


def test_a_wait_without_its_activity_is_damaged(per, options, original, tmp_path):
    """A requeued activity whose row is lost is counted as damaged, and no flush() waits for it for ever."""
    path = original.copy(tmp_path / "0.db", "db")
    change(path, "DELETE FROM perqueue_activity WHERE id = 7")
    live = Delivery(per, options, path)
    assert live.undelivered(original, original.pending) == {7}
    assert live.damaged == 1
    assert isinstance(live.error, OutboxError)
    assert not isinstance(live.error, FlushTimeout)
    assert change(path, "SELECT state FROM perqueue_settlement WHERE activity_id = 7") == [(4,)]
    assert change(path, "SELECT * FROM perqueue_retry") == []


def change(path, statement):
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        rows = connection.execute(statement).fetchall()
        connection.commit()
        return rows
