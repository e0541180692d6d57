"""The end of a program that never calls `close()`: deliver what can be delivered, in time and in silence."""

import gc
import threading
import time
from pathlib import Path

import pytest

from perqueue import PerQueue
from perqueue.sandbox import BadToken, Hang, Html, Status
from tests.helpers import Child, least, until, users

EXIT_TIMEOUT = 0.8
MARGIN = 1.5

IN_A_FUNCTION = """
def main():
    sys.exit()
main()
"""

PROGRAM = """
queue = PerQueue(exit_timeout=0.8)
for n in range(5):
    queue.record("GROUP", f"USER_{n}")
say(f"ending {time.monotonic()}")
"""
DELIVERS = PROGRAM.replace("0.8", "20")
"""The same where Per takes it: nobody waits for longer than that takes, however slow the machine."""

ALL = [f"USER_{n}" for n in range(5)]


def assert_ends_within(most, program, *arguments, env, code=0, before=lambda: None):
    """Run a program that must end in time, and in silence; return what one that fails has said on stderr."""

    def seconds_to_end():
        nonlocal errors
        before()
        with Child(program, *arguments, env=env) as child:
            began = float(child.expect("ending"))
            assert child.wait() == code
            took = time.monotonic() - began
            errors = child.errors()
        assert code or errors == ""
        return took

    errors = ""
    assert least(seconds_to_end, most) < most
    return errors


def assert_all_kept(outbox, options, per):
    """What was not delivered is delivered by the next start (invariant 3)."""
    per.clear_faults()
    with PerQueue(outbox, **options) as queue:
        queue.flush(10)
        assert queue.stats().pending == 0
    assert set(users(per)) >= set(ALL)


@pytest.mark.parametrize(
    ("host", "ending"),
    [("127.0.0.1", ""), ("localhost", ""), ("localhost", "sys.exit(0)"), ("127.0.0.1", IN_A_FUNCTION)],
    ids=["address", "host name", "sys.exit", "sys.exit in a function"],
)
def test_exit_delivers(per, env, ending, host):
    """A program that just ends has delivered, whatever the way to its end, also to a host name."""
    env["PER_BASE_URL"] = per.url.replace("127.0.0.1", host)
    assert_ends_within(EXIT_TIMEOUT + MARGIN, DELIVERS + ending, env=env, before=per.reset)
    assert sorted(users(per)) == ALL


@pytest.mark.parametrize("trouble", ["hanging", "down", "bad token", "error 503", "error page", "refusing"])
def test_exit_is_not_held_up(per, env, outbox, options, trouble):
    """When Per cannot take it, the program ends within exit_timeout, silently, and everything is kept."""
    faults = {"hanging": Hang(), "error 503": Status(503), "error page": Html(), "bad token": BadToken()}
    if trouble in faults:
        per.set_fault(faults[trouble])
    elif trouble == "down":
        per.go_down()
    else:
        per.set_tokens({"another-token": ["activity"]})
    assert_ends_within(EXIT_TIMEOUT + MARGIN, PROGRAM, env=env)
    if trouble == "down":
        per.come_back()
    if trouble == "refusing":
        per.set_tokens({per.activity_token: ["activity"]})
    per.release()
    assert_all_kept(outbox, options, per)


def test_exit_with_an_unknown_host_is_not_held_up(env):
    """A name that nobody resolves delays the end no longer than exit_timeout."""
    env["PER_BASE_URL"] = "https://per.invalid"
    assert_ends_within(EXIT_TIMEOUT + MARGIN, PROGRAM, env=env)


def test_exit_timeout_0_does_not_wait(per, env, outbox, options):
    """With exit_timeout=0 a program ends at once, and what it recorded is kept."""
    per.set_fault(Hang())
    assert_ends_within(MARGIN, PROGRAM.replace("0.8", "0"), env=env)
    per.release()
    assert_all_kept(outbox, options, per)


def test_exception_in_main_still_delivers(per, env):
    """A program that ends with a traceback shows its own and nothing else, and has delivered."""
    program = DELIVERS + "\nraise ValueError('its own mistake')"
    errors = assert_ends_within(EXIT_TIMEOUT + MARGIN, program, env=env, code=1, before=per.reset)
    assert errors.splitlines()[-1] == "ValueError: its own mistake"
    assert errors.count("Traceback") == 1
    assert "perqueue" not in errors
    assert sorted(users(per)) == ALL


@pytest.mark.parametrize(
    "ending", ["sys.exit(0)", "return", "raise SystemExit", "asyncio.get_running_loop().stop()"]
)
def test_exit_inside_asyncio_run(per, env, ending):
    """The end of a program inside asyncio.run() delivers, and no loop complains."""
    program = f"""
    import asyncio
    async def main():
        queue = PerQueue(exit_timeout=20)
        for n in range(5):
            queue.record("GROUP", f"USER_{{n}}")
        kept.append(queue)
        say(f"ending {{time.monotonic()}}")
        {ending}
    kept = []
    try:
        asyncio.run(main())
    except RuntimeError:
        pass  # "Event loop stopped before Future completed."
    """
    assert_ends_within(EXIT_TIMEOUT + MARGIN, program, env=env, before=per.reset)
    assert sorted(users(per)) == ALL


def test_daemon_threads_may_record_to_the_end(per, env, make_queue):
    """Daemon threads may record while the interpreter ends: no hang, no noise, no loss (invariant 1)."""
    program = """
    queue = PerQueue(exit_timeout=0.5)
    recorded = []
    def work(thread):
        n = 0
        while True:
            user = f"{thread}-{n}"
            try:
                queue.record("GROUP", user)
            except QueueClosed:
                return
            os.write(1, f"{user}\\n".encode())
            recorded.append(user)
            n += 1
            time.sleep(0.005)
    for thread in range(4):
        threading.Thread(target=work, args=(thread,), daemon=True).start()
    while len(recorded) < 50:
        time.sleep(0.005)
    """
    for _ in range(3):
        with Child(program, env=env) as child:
            recorded = child.succeed(10)
        queue = make_queue(activity_type_id="TYPE")
        queue.flush(20)
        queue.close()
        assert set(recorded) <= set(users(per))


def test_recording_at_exit(per, env, outbox):
    """A program's own exit handler may still record; what nobody delivers any more is kept."""
    program = """
    import atexit
    queue = PerQueue(exit_timeout=20)
    def last():
        try:
            queue.record("GROUP", "LAST")
        except QueueClosed:
            say("closed")
        else:
            say("recorded")
    atexit.register(last)
    queue.record("GROUP", "FIRST")
    """
    with Child(program, env=env) as child:
        said = child.succeed()
    assert said == ["recorded"]
    assert users(per) == ["FIRST", "LAST"]


def test_first_record_at_exit(per, env, make_queue):
    """A queue that is used for the first time while the interpreter ends loses nothing and says nothing."""
    program = """
    import atexit
    queue = PerQueue(exit_timeout=0.8)
    atexit.register(lambda: queue.record("GROUP", "LATE"))
    """
    with Child(program, env=env) as child:
        child.succeed()
    make_queue().flush(10)
    assert users(per) == ["LATE"]


def test_many_queues_share_the_exit_timeout(per, env, tmp_path):
    """Several queues of one program have exit_timeout together, not one after the other."""
    per.set_fault(Hang())
    program = """
    queues = [PerQueue(f"{sys.argv[1]}/{n}.db", exit_timeout=0.8) for n in range(5)]
    for queue in queues:
        queue.record("GROUP", "USER")
    say(f"ending {time.monotonic()}")
    """
    assert_ends_within(EXIT_TIMEOUT + MARGIN, program, tmp_path, env=env)


def test_sigterm_without_a_handler_loses_nothing(per, env, make_queue):
    """SIGTERM ends a program without any exit handler; what it recorded is delivered by the next start."""
    per.go_down()
    with Child(PROGRAM + "\ntime.sleep(60)", env=env) as child:
        child.expect("ending")
        child.process.terminate()
        assert child.wait() == -15
    per.come_back()
    make_queue().flush(10)
    assert sorted(users(per)) == ALL


def test_standby_exits_at_once(per, env):
    """A process that only stands by does not wait for the drainer's deliveries at its end."""
    per.set_fault(Hang())
    drainer = 'queue = PerQueue(exit_timeout=0)\nqueue.record("GROUP", "USER")\nsay("ready")\nhear()'
    with Child(drainer, env=env) as first:
        first.expect("ready")
        per.wait_for_requests(1)
        program = """
        queue = PerQueue(exit_timeout=5.0)
        queue.record("GROUP", "ANOTHER")
        while queue.stats().state != "standby":
            time.sleep(0.01)
        say(f"ending {time.monotonic()}")
        """
        assert_ends_within(MARGIN, program, env=env)


def _threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("perqueue")]


@pytest.mark.parametrize("drain", [True, False])
def test_dropped_queue_stops_its_threads(per, options, outbox, drain):
    """A queue that is dropped without close() stops its threads and closes its files."""
    queue = PerQueue(outbox, **{**options, "drain": drain})
    receipt = queue.record("GROUP", "USER")
    if drain:
        per.wait_for(1)
    assert _threads()
    del queue
    gc.collect()
    until(lambda: not _threads(), "its threads end")
    descriptors = [each for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    assert not [each for each in descriptors if str(outbox) in str(each.readlink())]
    assert receipt.id == 1


def test_queue_dropped_in_a_cycle_stops_its_threads(per, options, outbox):
    """Also a queue that is part of a reference cycle is collected, and leaves nothing running."""
    queue = PerQueue(outbox, **options)
    queue.record("GROUP", "USER")
    queue.myself = queue
    per.wait_for(1)
    del queue
    gc.collect()
    until(lambda: not _threads(), "its threads end")


def test_the_drain_lock_is_made_by_the_thread_that_records(make_queue):
    """At exit filelock looks at every lock: one that a thread is just making is a traceback on stderr."""
    queue = make_queue()
    makers, make = [], queue._worker._new_lock

    def noted():
        makers.append(threading.current_thread())
        return make()

    queue._worker._new_lock = noted
    queue.record("GROUP", "USER")
    queue.flush(10)
    assert makers == [threading.current_thread()]
