"""The command ``perqueue``: it parses, calls, prints, and says by its exit code whether that worked.

What a command needs beyond click is imported when it runs, so that ``perqueue --help`` is quick and
``perqueue status`` loads no HTTP.
"""

import click

from perqueue._version import __version__
from perqueue.cli._failure import Commands
from perqueue.cli.completion import completion
from perqueue.cli.datasette import datasette
from perqueue.cli.demo import demo
from perqueue.cli.doctor import doctor
from perqueue.cli.drain import drain
from perqueue.cli.history import history
from perqueue.cli.reconcile import reconcile
from perqueue.cli.record import record
from perqueue.cli.rejected import rejected
from perqueue.cli.report import report
from perqueue.cli.sandbox import sandbox
from perqueue.cli.status import status

__all__ = ["main"]


_VARIABLES_AND_CODES = """\b
Other variables:
  PER_ACTIVITY_TYPE_ID  the activity type to record
  PER_BASE_URL          where Per is, if not at https://api.useper.com
\b
Exit codes:
  0  what was asked for is done
  1  it is not: undelivered, refused, disk or Per failed; stderr says which
  2  the command, an option or the configuration is wrong
"""


@click.group(cls=Commands, epilog=_VARIABLES_AND_CODES)
@click.version_option(__version__, prog_name="perqueue")
def main() -> None:
    """Counts billable activity for the Per API, through a durable outbox on disk.

    The outbox is named by --outbox or PERQUEUE_OUTBOX. Tokens come from the environment only, because
    process lists show arguments: PER_ACTIVITY_TOKEN delivers, PER_REPORTING_TOKEN reads reports.
    """


for command in (
    record, drain, status, report, history, reconcile, rejected, doctor, sandbox, demo, datasette, completion
):  # fmt: skip
    main.add_command(command)
