"""Hosts as network namespaces, each with a network of its own to this one, which can be cut."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from pathlib import Path

import pytest

_CLONE_NEWNET = 0x40000000


class Host:
    """A network namespace that reaches this one as ``gateway``, until it is cut off."""

    def __init__(self, number: int) -> None:
        self.name = f"perqueue-{os.getpid()}-{number}"
        self.inside = ("ip", "netns", "exec", self.name)
        self.gateway = f"10.213.{number}.1"
        self._link = f"pq{os.getpid()}-{number}"
        made = subprocess.run(["ip", "netns", "add", self.name], capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"ip can make no network namespace here: {made.stderr.strip()}")
        inner = ["ip", "-n", self.name]
        for command in (
            ["ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.name],
            ["ip", "addr", "add", f"{self.gateway}/30", "dev", self._link],
            ["ip", "link", "set", self._link, "up"],
            [*inner, "addr", "add", f"10.213.{number}.2/30", "dev", "eth0"],
            [*inner, "link", "set", "eth0", "up"],
            [*inner, "link", "set", "lo", "up"],
        ):
            subprocess.run(command, check=True, capture_output=True)

    def cut(self) -> None:
        """Let every packet between this host and the others vanish."""
        for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
            self._filter("-A", chain, way, "eth0", "-j", "DROP")

    def mend(self) -> None:
        """Let everything through again."""
        self._filter("-F")

    def _filter(self, *rule: str) -> None:
        subprocess.run([*self.inside, "iptables", *rule], check=True, capture_output=True)

    def listen(self, port: int) -> socket.socket:
        """Return a socket of this process that listens at a port of the host's own loopback."""
        made: list[socket.socket] = []

        def enter() -> None:  # a thread can be on another host than the rest of its process
            with Path("/run/netns", self.name).open("rb") as space:
                assert ctypes.CDLL(None).setns(space.fileno(), _CLONE_NEWNET) == 0
            made.append(socket.create_server(("127.0.0.1", port)))

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return made[0]

    def remove(self) -> None:
        subprocess.run(["ip", "link", "del", self._link], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "del", self.name], check=False)


def need() -> None:
    """Skip, by name, where a tool is missing."""
    for tool, package in (("ip", "iproute2"), ("iptables", "iptables")):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: {package})")
