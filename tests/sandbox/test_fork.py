import os
import signal
import socket
import struct
import threading
import warnings

import httpx
import pytest

from perqueue.sandbox import Hang, ResetBeforeAccepting, Sandbox


@pytest.fixture
def child(per):
    """A forked child that lives until the test ends, and holds whatever it inherited."""
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    yield pid
    os.close(writer)
    assert os.waitpid(pid, 0)[1] == 0


def _fork():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork with threads is the point here
        return os.fork()


def _connect(per):
    return socket.create_connection(("127.0.0.1", int(per.url.rsplit(":")[-1])), timeout=5)


def test_a_forked_child_does_not_keep_the_port_open(per, child):
    """Down is down, and stopped is stopped, while a child lives."""
    per.go_down()
    with pytest.raises(httpx.ConnectError):
        httpx.get(per.url, trust_env=False)
    per.come_back()
    assert httpx.get(per.url, trust_env=False).status_code == 404
    per.stop()
    with pytest.raises(httpx.ConnectError):
        httpx.get(per.url, trust_env=False)


def test_a_forked_child_does_not_keep_connections_open(per):
    """A connection that a child inherited is reset and dropped like any other."""
    per.set_fault(Hang(), endpoint="reports.get")
    with _connect(per) as first, _connect(per) as second:
        second.sendall(b"GET /reports.get HTTP/1.1\r\nHost: per\r\n\r\n")
        first.sendall(b"GET /nothing HTTP/1.1\r\nHost: per\r\n\r\n")
        assert first.recv(10_000).startswith(b"HTTP/1.1 404")
        per.wait_for_requests(1)
        reader, writer = os.pipe()
        pid = _fork()
        if pid == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        try:
            per.set_fault(ResetBeforeAccepting())
            first.sendall(b"GET /activities.add HTTP/1.1\r\nHost: per\r\n\r\n")
            with pytest.raises(ConnectionResetError):
                first.recv(1000)
            per.go_down()
            assert second.recv(1000) == b""
        finally:
            os.close(reader)
            os.close(writer)
            os.waitpid(pid, 0)


def test_a_forked_child_inherits_a_stopped_sandbox(per):
    """There it can be looked at and stopped, without any effect on the parent."""
    threads = threading.active_count()
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        try:
            per.stop()
            per.reset()
            ok = per.activities == () and "stopped" in repr(per) and threading.active_count() == 1
        except BaseException:  # noqa: BLE001  (a child of a test must never return into pytest)
            ok = False
        os.write(writer, struct.pack("?", ok))
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 1) == b"\x01"
    os.close(reader)
    os.close(writer)
    assert threading.active_count() == threads
    assert httpx.get(per.url, trust_env=False).status_code == 404


def test_a_child_may_run_a_sandbox_of_its_own(per):
    """A new one, on another port, works in the child as anywhere."""
    pid = _fork()
    if pid == 0:
        code = 1
        try:
            with Sandbox() as own:
                code = 0 if httpx.get(own.url, trust_env=False).status_code == 404 else 1
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def test_a_forked_child_finds_no_lock_taken(per):
    """A child forked while another thread is inside the ledger and the faults uses both without a hang."""
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with per._ledger._changed, per._faults._lock:
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    pid = _fork()
    if pid == 0:
        signal.alarm(10)
        try:
            per.reset()
            os._exit(0)
        finally:
            os._exit(1)
    leave.set()
    thread.join()
    assert os.waitpid(pid, 0)[1] == 0
