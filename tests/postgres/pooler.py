"""pgbouncer in front of a server, in transaction mode: each transaction may meet another server process."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import postgresql
from tests.helpers import free_port

if TYPE_CHECKING:
    from typing import Self

SETTINGS = """
[databases]
{name} = host=127.0.0.1 port={server.port} dbname=postgres connect_query='SET search_path = {name}'
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = plain
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = 3
max_client_conn = {most}
server_round_robin = 1
"""
"""In turn: what relies on one server process fails at once, and not once a week."""


class Pooler:
    """One pgbouncer for one schema of a server."""

    def __init__(self, server: postgresql.Server, schema: str, most: int = 200) -> None:
        program = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin")
        if program is None:
            pytest.skip("pgbouncer is not installed (Debian: pgbouncer)")
        self.folder = Path(tempfile.mkdtemp(prefix="perqueue-bouncer-"))
        self.folder.chmod(0o755)
        self.port = free_port()
        self.url = f"postgresql://perqueue:{postgresql.PASSWORD}@127.0.0.1:{self.port}/{schema}"
        settings = self.folder / "settings.ini"
        settings.write_text(
            SETTINGS.format(name=schema, server=server, port=self.port, folder=self.folder, most=most)
        )
        (self.folder / "users").write_text(f'"perqueue" "{postgresql.PASSWORD}"\n')
        with (self.folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [program, "-q", settings], stderr=log, stdout=log, cwd="/", **postgresql.unprivileged()
            )

    def __enter__(self) -> Self:
        import psycopg

        deadline = time.monotonic() + 10
        while True:
            try:
                psycopg.connect(self.url).close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.01)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.folder)
