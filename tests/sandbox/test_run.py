import signal
import subprocess
import sys
import threading

import httpx
import pytest

from perqueue.sandbox import run

PROGRAM = """
from perqueue.sandbox import run

sandbox = run(
    on_ready=lambda per: print(per.url, flush=True),
    on_activity=lambda activity: print(activity.user_id, flush=True),
    latency=0.001,
)
print("stopped after", sandbox.accepted, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_comes(number):
    """It announces its URL, shows each activity, and leaves with status 0 and nothing on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-X", "dev", "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        url = process.stdout.readline().strip()
        query = "billingId=b&userId=USER_7&activityTypeId=t"
        headers = {"Authorization": "Bearer sandbox-activity-token"}
        assert (
            httpx.get(f"{url}/activities.add?{query}", headers=headers, trust_env=False).json()["ok"] is True
        )
        assert process.stdout.readline() == "USER_7\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (0, "stopped after 1\n", "")


def test_it_needs_the_main_thread():
    """Elsewhere no signal can be handled: an error says so, and no handler is left."""
    errors = []

    def attempt():
        try:
            run()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(5)
    assert len(errors) == 1


def test_the_former_signal_handlers_return():
    """Whatever happens inside, the program's own handlers are back afterwards."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def fail(_per):
        raise LookupError

    with pytest.raises(LookupError):
        run(on_ready=fail)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
