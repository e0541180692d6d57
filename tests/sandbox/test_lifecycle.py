import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import trustme

import perqueue.sandbox
from perqueue.sandbox import Hang, ResetBeforeAccepting, Sandbox


def _descriptors():
    return {link.name for link in Path("/proc/self/fd").iterdir()}


def _get(per, **options):
    url = f"{per.url}/activities.add?billingId=b&userId=u&activityTypeId=t"
    headers = {"Authorization": f"Bearer {per.activity_token}"}
    return httpx.get(url, headers=headers, trust_env=False, **options)


def test_starting_and_stopping_may_be_repeated():
    """The port is kept, as is what was received; stopping a stopped one does nothing."""
    per = Sandbox()
    per.stop()
    with pytest.raises(RuntimeError, match="never started"):
        _ = per.url
    per.start()
    per.start()
    url = per.url
    assert _get(per).json()["ok"] is True
    per.stop()
    per.stop()
    with pytest.raises(httpx.ConnectError):
        _get(per)
    per.start()
    assert per.url == url
    assert _get(per).json()["ok"] is True
    assert per.accepted == 2
    per.stop()


def test_ten_threads_may_start_and_stop_at_once():
    """Whatever their order, nothing breaks and nothing is left."""
    per = Sandbox()

    def turn(number):
        (per.start, per.stop)[number % 2]()

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(turn, range(100)))
    per.start()
    assert _get(per).json()["ok"] is True
    per.stop()


def test_no_descriptor_is_left():
    """Stopping closes every socket, also with connections open and requests hanging."""
    before = _descriptors()
    per = Sandbox()
    for _ in range(3):
        with per, httpx.Client(trust_env=False) as client:
            client.get(f"{per.url}/reports.get")
            per.set_fault(Hang())
            with pytest.raises(httpx.ReadTimeout):
                _get(per, timeout=0.05)
    assert _descriptors() == before


def test_stopping_is_quick_with_hanging_requests(per):
    """A request that hangs is cut off, and stopping waits for none."""
    per.set_fault(Hang())
    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(_get, per) for _ in range(5)]
        per.wait_for_requests(5)
        began = time.monotonic()
        per.stop()
        assert time.monotonic() - began < 4
        assert all(isinstance(future.exception(5), httpx.TransportError) for future in futures)
    assert per.max_concurrent == 5


def test_going_down_refuses_connections_and_drops_open_ones(per):
    """Kept-alive connections end, new ones are refused; back again, the port is the same."""
    url = per.url
    with httpx.Client(trust_env=False) as client:
        client.get(f"{url}/reports.get")
        connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":")[-1])), timeout=5)
        per.go_down()
        per.go_down()
        with connection:
            assert connection.recv(1) == b""
        with pytest.raises(httpx.ConnectError):
            client.get(f"{url}/reports.get")
        assert "down" in repr(per)
        per.come_back()
        per.come_back()
        assert client.get(f"{url}/reports.get").status_code == 401
    assert per.url == url


def test_a_connection_made_just_before_going_down_is_dropped(per):
    """However little of it the server has seen, the client is told."""
    port = int(per.url.rsplit(":")[-1])
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            per.go_down()
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""
        per.come_back()


def test_while_down_no_connection_can_reach_itself(per):
    """The port stays reserved, so that even a client on the same machine is always refused."""
    port = int(per.url.rsplit(":")[-1])
    per.go_down()
    for _ in range(200):
        with socket.socket() as stranger:
            assert stranger.connect_ex(("127.0.0.1", port)) != 0
    with socket.socket() as thief, pytest.raises(OSError, match="in use"):
        thief.bind(("127.0.0.1", port))


def test_going_down_needs_a_started_sandbox():
    """A stopped sandbox neither goes down nor comes back."""
    per = Sandbox()
    for action in (per.go_down, per.come_back):
        with pytest.raises(RuntimeError, match="not started"):
            action()


def test_a_port_that_is_taken_is_an_error(per):
    """The second sandbox on one port fails at its start, and leaves nothing behind."""
    second = Sandbox(port=int(per.url.rsplit(":")[-1]))
    with pytest.raises(OSError, match="in use"):
        second.start()
    second.stop()


def test_waiting_ends_with_the_activity_it_waits_for(per):
    """It returns once enough activities were accepted, and raises when time is up."""
    with pytest.raises(TimeoutError, match="0 of 2 activities"):
        per.wait_for(2, timeout=0.01)
    with pytest.raises(TimeoutError, match="0 of 1 requests"):
        per.wait_for_requests(1, timeout=0.01)
    thread = threading.Thread(target=lambda: [_get(per), _get(per)])
    thread.start()
    per.wait_for(2)
    thread.join()
    assert per.accepted == 2


def test_a_reset_forgets_everything_received(per):
    """Activities, requests and faults are gone; the sandbox goes on."""
    per.set_fault(ResetBeforeAccepting(), times=5)
    with pytest.raises(httpx.ReadError):
        _get(per)
    per.reset()
    assert (per.activities, per.requests, per.request_log, per.max_concurrent) == ((), 0, (), 0)
    assert _get(per).json()["ok"] is True


def test_the_highest_concurrency_is_known():
    """As many requests as were under way at once, not as many as came."""
    with Sandbox(latency=0.2) as per:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: _get(per), range(4)))
        _get(per)
        assert per.max_concurrent == 4


def test_callbacks_see_requests_and_activities(caplog):
    """Both are called, and one that fails is logged without harm to the answer."""
    seen = []

    def fail(activity):
        seen.append(activity)
        raise LookupError("a display that broke")

    with Sandbox(on_request=seen.append, on_activity=fail) as per:
        assert _get(per).json()["ok"] is True
        assert seen == [per.request_log[0], per.activities[0]]
    assert "a callback of the sandbox failed" in caplog.text


def test_a_callback_cannot_stop_the_sandbox():
    """It would wait for itself: an error says so."""
    errors = []

    def stop(_):
        with pytest.raises(RuntimeError, match="use another thread") as caught:
            per.stop()
        errors.append(caught.value)

    per = Sandbox(on_request=stop)
    with per:
        _get(per)
    assert len(errors) == 1


def test_it_serves_https():
    """With a context it speaks TLS, and its faults break the connection there, too."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with Sandbox(ssl_context=server) as per:
        assert per.url.startswith("https://")
        assert _get(per, verify=trusting).json()["ok"] is True
        per.set_fault(ResetBeforeAccepting(), times=1)
        with pytest.raises(httpx.TransportError):  # Python's ssl may show a reset as an end
            _get(per, verify=trusting)
        per.set_fault(Hang())
        with pytest.raises(httpx.ReadTimeout):
            _get(per, verify=trusting, timeout=0.2)


def test_it_serves_ipv6():
    """The URL of an IPv6 address has its brackets."""
    try:
        with Sandbox(host="::1") as per:
            assert per.url.startswith("http://[::1]:")
            assert _get(per).json()["ok"] is True
    except OSError:
        pytest.skip("no IPv6 on this machine")


@pytest.mark.parametrize(
    "options", [{"latency": -1}, {"clock": lambda: __import__("datetime").datetime(2020, 1, 1)}]
)
def test_options_are_checked(options):
    """A negative latency and a clock without a time zone are refused."""
    with pytest.raises(ValueError):
        Sandbox(**options)


def test_all_names_are_public_and_sorted():
    """What is imported at the door is what `__all__` says."""
    public = {
        name
        for name, value in vars(perqueue.sandbox).items()
        if not name.startswith("_") and not _is_module(value)
    }
    assert perqueue.sandbox.__all__ == sorted(public)


def _is_module(value):
    return isinstance(value, type(sys))


def test_a_missing_aiohttp_is_explained(tmp_path):
    """The error names what to install."""
    program = "import sys; sys.modules['aiohttp'] = None; import perqueue.sandbox"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert "install useper-perqueue[sandbox]" in answer.stderr.splitlines()[-1]
