"""``perqueue sandbox``."""

from __future__ import annotations

import errno
import json
import threading
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from perqueue._words import counted
from perqueue.cli import _print
from perqueue.cli._failure import Misuse, why
from perqueue.cli._options import Seconds, examples

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from perqueue.sandbox import Fault, RequestSeen, Sandbox

_LINES = 10
_INTERVAL = 0.5


@click.command(
    epilog=examples(
        "perqueue sandbox",
        "perqueue sandbox --port 0 --latency 0.05",
        "perqueue sandbox --fault status:code=503,times=20",
        "perqueue sandbox --fault rate_limit:per_second=50 --fault hang:times=1",
    )
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8423, show_default=True, help="Port; 0: any free one."
)
@click.option(
    "--latency", type=Seconds(0), default=0.0, metavar="SECONDS", help="Wait so long before each answer."
)
@click.option(
    "--fault", "faults", multiple=True, metavar="FAULT", help="Go wrong in this way; may be given repeatedly."
)
@click.option("--list-faults", is_flag=True, help="Show the faults that there are, and end.")
@click.option("--quiet", "-q", is_flag=True, help="Do not show what arrives.")
def sandbox(
    host: str, port: int, latency: float, faults: Sequence[str], *, list_faults: bool, quiet: bool
) -> None:
    """Run a local Per, which stands in for the real one, until Ctrl-C.

    It prints the variables that make programs talk to it, and then what arrives. What it received is
    gone when it ends.

    A fault is a name from --list-faults, and after a colon its parameters. `times` says how many
    requests meet it (without it: all), `endpoint` which ones: activities.add (unless told otherwise),
    reports.get or both.
    """
    try:
        import perqueue.sandbox as local
    except ImportError as error:
        raise Misuse(str(error)) from error
    if list_faults:
        rows = [(each.name, each.parameters, each.summary) for each in local.describe_faults()]
        for name, parameters, summary in rows:
            click.echo(f"{name}" + (f":  {parameters}" if parameters else "") + f"\n    {summary}")
        return
    planned = [_fault(text) for text in faults]
    listens = False

    def ready(running: Sandbox) -> None:
        nonlocal listens
        listens = True
        for fault, options in planned:
            try:
                running.set_fault(fault, **options)
            except (TypeError, ValueError) as error:
                raise Misuse(f"--fault: {error}") from error
        _introduce(running)

    with _shown(quiet=quiet) as seen:
        try:
            ended = local.run(host=host, port=port, latency=latency, on_ready=ready, on_request=seen)
        except OSError as error:
            if listens:
                raise  # standard output takes nothing
            remedy = "try --host 127.0.0.1" if error.errno == errno.EADDRNOTAVAIL else "try --port 0"
            raise Misuse(f"cannot listen on {host} port {port}: {why(error)}; {remedy}") from error
    click.echo(f"\n{counted(ended.requests, 'request')}, {counted(ended.accepted, 'activity')} accepted")


def _fault(text: str) -> tuple[Fault, dict[str, Any]]:
    from perqueue.sandbox import make_fault

    name, _, rest = text.partition(":")
    parameters: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise click.UsageError(f"--fault {text}: write parameters as name:key=value,key=value.")
        try:
            parameters[key] = json.loads(value)
        except ValueError:
            parameters[key] = value
    options: dict[str, Any] = {key: parameters.pop(key) for key in ("times", "endpoint") if key in parameters}
    try:
        return make_fault(name, parameters), options
    except ValueError as error:
        raise click.UsageError(f"--fault {text}: {error}.") from error


def _introduce(running: Sandbox) -> None:
    # An address that means "all of them" is good to listen on, and none to connect to.
    url = running.url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    click.echo(
        f"A local Per listens on {url}. To have programs use it:\n\n"
        f"  export PER_BASE_URL={url}\n"
        f"  export PER_ACTIVITY_TOKEN={running.activity_token}\n"
        f"  export PER_REPORTING_TOKEN={running.reporting_token}\n"
        f"  export PER_ACTIVITY_TYPE_ID={running.activity_type_id}\n\n"
        "Ctrl-C ends it.\n"
    )


@contextmanager
def _shown(*, quiet: bool) -> Iterator[Any]:
    """Print requests from a thread of its own, so that no answer waits for a terminal."""
    if quiet:
        yield None
        return
    seen: deque[RequestSeen] = deque()
    over = threading.Event()

    def printing() -> None:
        while not over.wait(_INTERVAL):
            _print_requests([seen.popleft() for _ in range(len(seen))])
        _print_requests(list(seen))

    thread = threading.Thread(target=printing, name="perqueue-show", daemon=True)
    thread.start()
    try:
        yield seen.append
    finally:
        over.set()
        thread.join()


def _print_requests(requests: Sequence[RequestSeen]) -> None:
    for request in requests[:_LINES]:
        query = request.parameters
        outcome = "accepted" if request.accepted else ""
        if request.fault is None and not request.accepted:
            outcome = "refused" if request.path == "/activities.add" else "answered"
        fault = f"({request.fault})" if request.fault else ""
        what = [request.path.removeprefix("/"), *(query[name] for name in query)]
        happened = " ".join(filter(None, (outcome, fault)))
        click.echo(_print.printable(f"{request.at.astimezone():%H:%M:%S}  {happened:<20}  {'  '.join(what)}"))
    rest = requests[_LINES:]
    if rest:
        accepted = sum(request.accepted for request in rest)
        click.echo(f"          and {len(rest):,} more, {accepted:,} of them accepted")
