"""A real PostgreSQL server in a temporary directory, for as long as the tests need it."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import free_port

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PASSWORD = "s3cret"


def binaries() -> Path | None:
    """Return the folder with initdb and postgres, the newest if there are several; None without any."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if found:
        return found[-1].parent
    initdb = shutil.which("initdb")
    return Path(initdb).resolve().parent if initdb else None


def unprivileged() -> dict[str, Any]:
    """Return how to run a server that refuses root."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


class Server:
    """One server process, listening on loopback and on a socket in its own folder."""

    def __init__(
        self,
        settings: Iterable[str] = (),
        *,
        network: str | None = None,
        primary: Server | None = None,
        at: int = 0,
    ) -> None:
        """Make one and start it; as a standby of ``primary``, which it follows at the port ``at``.

        Whoever knows the password is let in from this machine, and from a ``network``.
        """
        folder = binaries()
        assert folder is not None
        self._binaries = folder
        self.folder = Path(tempfile.mkdtemp(prefix="perqueue-pg-"))
        self._as = unprivileged()
        if self._as:
            os.chown(self.folder, self._as["user"], self._as["group"])
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self.data = self.folder / "data"
        self.port = free_port()
        self._run(*self._base_backup(primary) if primary else self._initdb(password))
        if network is not None:
            with (self.data / "pg_hba.conf").open("a") as rules:
                rules.write(f"host all all {network} md5\n")
        self._settings = [
            f"port={self.port}",
            "listen_addresses=127.0.0.1",
            f"unix_socket_directories={self.folder}",
            "fsync=off",
            "max_connections=200",
            "shared_buffers=64MB",
            *settings,
        ]
        if primary is not None:
            source = primary.url.replace(f":{primary.port}/", f":{at or primary.port}/")
            self._settings += [f"primary_conninfo={source}?application_name=standby"]
            self._settings += ["wal_retrieve_retry_interval=100ms"]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def _initdb(self, password: Path) -> tuple[object, ...]:
        # md5: a thousand connections with SCRAM take three seconds more.
        return (
            self._binaries / "initdb", "-D", self.data, "-U", "perqueue", "--no-sync", "-E", "UTF8",
            "--locale=C", "-A", "md5", f"--pwfile={password}",
        )  # fmt: skip

    def _base_backup(self, primary: Server) -> tuple[object, ...]:
        return (
            self._binaries / "pg_basebackup", "-d", primary.url, "-D", self.data, "-R", "-X", "stream",
            "--checkpoint=fast", "--no-sync",
        )  # fmt: skip

    def _run(self, *command: object) -> None:
        parts = [str(part) for part in command]
        done = subprocess.run(parts, capture_output=True, text=True, cwd="/", check=False, **self._as)
        assert done.returncode == 0, done.stderr

    @property
    def url(self) -> str:
        """The address of the database `postgres`, over TCP."""
        return f"postgresql://perqueue:{PASSWORD}@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, and wait until it takes connections."""
        options = [part for setting in self._settings for part in ("-c", setting)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self._binaries / "postgres", "-D", self.data, *options],
                stdout=log,
                stderr=log,
                cwd="/",
                **self._as,
            )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Wait until it takes connections."""
        import psycopg

        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg.connect(self.url).close()
            except psycopg.OperationalError:
                assert self.process is not None
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.02)
            else:
                return

    def stop(self, number: int = signal.SIGINT) -> None:
        """End it: SIGINT disconnects everybody, SIGQUIT is a crash, SIGTERM waits for all to leave."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def murder(self) -> None:
        """End it as `kill -9` does."""
        self.stop(signal.SIGKILL)

    def ensure_started(self) -> None:
        """Start it, if the test before has left it ended."""
        if self.process is None:
            self.start()

    def sql(self, *statements: str, database: str = "postgres") -> list[Any]:
        """Run statements, and return the rows of the last."""
        import psycopg

        url = self.url.rpartition("/")[0] + f"/{database}"
        with psycopg.connect(url, autocommit=True) as connection:
            rows: list[Any] = []
            for statement in statements:
                cursor = connection.execute(statement)  # type: ignore[call-overload]
                rows = cursor.fetchall() if cursor.description else []
            return rows

    def close(self) -> None:
        """End it, and remove its files."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def database() -> Iterator[Server]:
    """Start a PostgreSQL server of this run's own, whose data survives no power cut."""
    need()
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def mortal() -> Iterator[Server]:
    """Start a server that tests may stop and kill."""
    need()
    server = Server(["max_connections=30", "max_prepared_transactions=5"])
    yield server
    server.close()


def need() -> None:
    """Skip, by name, where there is no server to be started."""
    if binaries() is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: postgresql)")
    pytest.importorskip("psycopg")
