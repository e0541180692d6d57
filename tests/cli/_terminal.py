"""A program on a terminal."""

import fcntl
import os
import struct
import subprocess
import sys
import termios

_UNWANTED = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")


class Terminal:
    """A Python program on a terminal of its own, 24 lines high; ended with the block."""

    def __init__(self, arguments, env, columns=80):
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        clean = {name: value for name, value in os.environ.items() if name not in _UNWANTED}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave,
            env={**clean, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **env},
            start_new_session=True,
        )  # fmt: skip
        os.close(slave)
        self.output = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self):
        """Read on; False once all of its writers have gone."""
        try:
            chunk = os.read(self._master, 1 << 16)
        except OSError:
            return False
        self.output += chunk.decode(errors="replace").replace("\r\n", "\n")
        return True

    def until(self, words):
        """Wait for these words."""
        while words not in self.output:
            assert self._read(), f"no {words!r} in {self.output!r}"

    def end(self, number=None):
        """Wait for its end, after a signal if one is given; return the exit code."""
        if number is not None:
            self.process.send_signal(number)
        while self._read():
            pass
        return self.process.wait(20)
