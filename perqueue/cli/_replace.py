"""A file is the old one or the new one, and nothing in between."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file as a whole; if that fails, what was there before is untouched.

    A new file is for its owner only, since it may hold IDs of users; an existing one keeps its permissions.
    What is no regular file, such as /dev/stdout, is written to.
    """
    path = Path(os.path.realpath(path))
    mode = 0o600
    with suppress(FileNotFoundError):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            path.write_bytes(content)
            return
        mode = stat.S_IMODE(status.st_mode)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".perqueue-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
