"""``perqueue datasette``: what makes Datasette a web view of the outbox."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import click

from perqueue.cli._options import examples, existing_file, outbox_option, outbox_to_read


@click.command(
    short_help="Print a configuration for a view in the browser.",
    epilog=examples(
        "pip install 'useper-perqueue[datasette]'",
        "perqueue datasette --outbox activities.db | datasette -m - activities.db",
        "perqueue datasette --outbox activities.db > metadata.yaml",
    ),
)
@outbox_option
def datasette(outbox: str) -> None:
    """Print the configuration with which Datasette shows the outbox in a browser.

    Datasette's option -m takes it: charts of the backlog, of deliveries and of answer times, and queries
    such as one activity's story, late ones per month, and what Per refused. It is YAML and holds the
    file's name, by which Datasette finds it, and nothing of what the file holds.

    Datasette is not part of perqueue: the first line below brings the releases that this is tested with.
    Never give it the option --immutable for an outbox that is in use.
    """
    existing_file(outbox)
    outbox_to_read(outbox)
    text = files("perqueue.cli").joinpath("datasette.yaml").read_text(encoding="utf-8")
    click.echo(text.replace('"activities"', json.dumps(Path(outbox).stem)), nl=False)
