import contextlib
import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from perqueue import PerQueue
from perqueue.cli._flush import Stopped, watched_flush
from perqueue.exceptions import FlushTimeout
from perqueue.sandbox import BadToken, Hang, Latency, Refuse, Status
from tests.helpers import repeats


@pytest.fixture
def record(make_queue):
    """Record so many activities, with nobody here to deliver them."""

    def fill(count, billing_id="GROUP_A"):
        queue = make_queue(drain=False)
        for number in range(count):
            queue.record(billing_id, f"USER_{number}")
        return queue

    return fill


def test_everything_arrives(perqueue, record, per):
    """`drain` delivers what is there, says how much that was, and returns 0."""
    record(25)
    result = perqueue("drain")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("delivered 25 in ")
    assert result.stdout.endswith("0 pending, 0 rejected\n")
    assert per.accepted == 25


def test_an_empty_outbox(perqueue, record):
    """`drain` has nothing to do in an empty outbox, and returns 0."""
    record(0)
    assert perqueue("drain").exit_code == 0


def test_a_refused_activity_is_exit_code_1(perqueue, record, per):
    """`drain` returns 1 with Per's reason if Per refuses an activity, though all others arrive."""
    record(5)
    per.set_fault(Refuse("unknown_user"), when=lambda activity: activity.user_id == "USER_3")
    result = perqueue("drain")
    assert result.exit_code == 1
    assert "4 in" in result.stdout
    assert "1 rejected" in result.stdout
    assert "unknown_user" in result.stderr
    assert "perqueue rejected list" in result.stderr
    assert result.stderr.count("\n") == 1
    assert perqueue("drain").exit_code == 0  # told once: nothing is pending


def test_what_does_not_arrive_in_time_is_exit_code_1(perqueue, record, per):
    """`drain --timeout` returns 1 with the reason when Per does not answer, and everything is kept."""
    queue = record(3)
    per.set_fault(Status(503))
    result = perqueue("drain", "--timeout", "0.5")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "503" in result.stderr
    assert "3 pending" in result.stdout
    assert queue.stats().pending == 3


def test_a_bad_token_is_exit_code_1_at_once(perqueue, record, per):
    """`drain` returns 1 without waiting when Per refuses the token, and the token is not shown."""
    record(3)
    per.set_fault(BadToken())
    began = time.monotonic()
    result = perqueue("drain")
    assert result.exit_code == 1
    assert "refused the activity token" in result.stderr
    assert per.activity_token not in result.output
    assert time.monotonic() - began < 10


def test_it_counts_what_it_delivers_before_it_looks(perqueue, make_queue, monkeypatch, until):
    """Delivery begins with the opening: what Per had before the first look is counted, too."""
    make_queue(drain=False).record("GROUP_A", "USER_1")
    begin = PerQueue.__init__

    def slowly(self, *arguments, **options):
        begin(self, *arguments, **options)
        until(lambda: self.stats().pending == 0)

    monkeypatch.setattr(PerQueue, "__init__", slowly)
    assert perqueue("drain").output.startswith("delivered 1 in ")


def test_it_waits_for_another_process_that_delivers(perqueue, make_queue, per):
    """`drain` on an outbox that somebody else delivers waits for that, and returns 0."""
    other = make_queue()
    per.set_fault(Latency(0.3))
    receipt = other.record("GROUP_A", "USER_1")
    assert perqueue("drain").exit_code == 0
    assert receipt.wait(0.1)
    assert (per.accepted, other.stats().delivered) == (1, 1)


def test_without_a_timeout_it_goes_on_while_anything_moves(make_queue, per):
    """Without a timeout a slow delivery is waited for, and given up only when nothing moves."""
    queue = make_queue(max_in_flight=1)
    per.set_fault(Latency(0.4))
    for number in range(6):
        queue.record("GROUP_A", f"USER_{number}")
    seen = []

    def pause(seconds):
        time.sleep(seconds)
        return False

    watched_flush(queue, timeout=None, patience=1.5, look=seen.append, pause=pause)
    assert per.accepted == 6
    assert seen
    per.set_fault(Hang())
    queue.record("GROUP_A", "USER_6")
    with pytest.raises(FlushTimeout, match=r"nothing was accepted for 1\.5 s, 1 activity kept") as raised:
        watched_flush(queue, timeout=None, patience=1.5, look=seen.append, pause=pause)
    assert raised.value.pending == 1
    with pytest.raises(Stopped):
        watched_flush(queue, timeout=None, patience=60, look=seen.append, pause=lambda _: True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_watching_ends_gracefully(start, record, per, number):
    """A signal ends `drain --watch` with 0, after what is in flight is answered and settled."""
    queue = record(40)
    per.set_fault(Latency(0.4))
    program = start("drain", "--watch")
    assert "watching" in program.err.next(20)
    per.wait_for(3)
    program.process.send_signal(number)
    code, out, err = program.wait()
    assert (code, out) == (0, [])
    assert "stopping" in err[-1]
    accepted = per.accepted
    assert 3 <= accepted < 40
    assert queue.stats().delivered == accepted
    per.clear_faults()
    finish = start("drain")
    assert finish.wait()[0] == 0
    assert (per.accepted, repeats(per)) == (40, 0)


def test_watching_delivers_what_others_record(start, record, per, until, outbox):
    """`drain --watch` delivers what any process records, from the first one on, and tells trouble once."""
    outbox.unlink(missing_ok=True)
    program = start("drain", "--watch")
    assert "watching" in program.err.next(20)
    until(outbox.exists)
    record(2)
    per.wait_for(2)
    per.go_down()
    queue = record(1, "GROUP_B")
    assert "backing off" in program.err.next(20)
    per.come_back()
    per.wait_for(3, timeout=30)
    assert program.err.next(20).endswith("delivering")
    until(lambda: queue.stats().pending == 0)
    program.process.terminate()
    code, _, err = program.wait()
    assert (code, len(err)) == (0, 1)


def test_a_signal_ends_a_plain_drain_with_1(start, record, per):
    """A signal during `drain` is exit code 1: what is pending is told, and what was in flight is settled."""
    queue = record(10)
    per.set_fault(Latency(0.3))
    program = start("drain")
    per.wait_for(1)
    program.process.terminate()
    code, _, err = program.wait()
    assert code == 1
    assert len(err) == 1
    assert "stopped" in err[0]
    assert queue.stats().delivered == per.accepted < 10


def test_a_second_signal_ends_it_at_once(start, record, per, until):
    """A second SIGTERM does not wait for an answer that does not come."""
    record(1)
    per.set_fault(Hang())
    program = start("drain", "--watch")
    per.wait_for_requests(1)
    program.process.terminate()
    until(lambda: "stopping" in (program.err.next(20) or ""))
    program.process.terminate()
    assert program.wait()[0] == -signal.SIGTERM


def test_a_progress_bar_on_a_terminal(env, record, per):
    """On a terminal `drain` shows a progress bar that ends full."""
    record(30)
    terminal, side = pty.openpty()
    program = subprocess.Popen(
        [sys.executable, "-m", "perqueue", "drain"], stdout=side, stderr=side, env={**os.environ, **env}
    )
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert program.wait(20) == 0
    assert b"30/30" in shown
    assert per.accepted == 30
