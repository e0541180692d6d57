"""From a file to a database and back: the new URL for the programs, and one drain of the old outbox."""

import pytest

from tests.helpers import repeats, users


@pytest.fixture
def outboxes(tmp_path, outbox):
    """A file and a database."""
    return tmp_path / "activities.db", outbox


@pytest.mark.parametrize("to", ["database", "file"])
def test_changing_over_loses_and_doubles_nothing(per, make_queue, perqueue, outboxes, to):
    """The old outbox is emptied by a drain of its own while the programs use the new one."""
    old, new = outboxes if to == "database" else reversed(outboxes)
    program = make_queue(old, drain=False)
    for number in range(50):
        program.record("GROUP", f"OLD_{number}")
    program.close()
    program = make_queue(new)
    for number in range(50):
        program.record("GROUP", f"NEW_{number}")
    result = perqueue("drain", "--outbox", old)
    assert (result.exit_code, result.output[:13]) == (0, "delivered 50 ")
    program.flush(10)
    assert set(users(per)) == {f"{when}_{number}" for when in ("OLD", "NEW") for number in range(50)}
    assert repeats(per) == 0
    assert '"pending": 0' in perqueue("status", "--outbox", old, "--json").output
