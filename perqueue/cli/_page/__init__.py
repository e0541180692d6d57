"""The page of ``perqueue report --html``: one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
from datetime import datetime, timedelta
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from perqueue._clock import datetime_from_ms
from perqueue._version import __version__
from perqueue._words import counted
from perqueue.cli import _print
from perqueue.cli._page.charts import columns, spark, top_of

if TYPE_CHECKING:
    from perqueue._reconcile import Reconciliation, ReconciliationRow
    from perqueue.cli._findings import Findings, Key
    from perqueue.cli._series import By, Span

_TOP = 15
"""Billing IDs in a chart."""
_NOTES = 200
"""Numbers that are explained one by one."""
_COUNTS = {
    "per_unique": "Per",
    "delivered_unique": "delivered",
    "recorded_unique": "recorded",
    "late": "late",
    "uncertain": "uncertain",
    "pending": "pending",
    "rejected": "rejected",
}
_ALWAYS = ("per_unique", "delivered_unique", "recorded_unique")
_VERDICTS = ("unexplained", "explained", "match")


def render(found: Findings) -> bytes:
    """Return the page."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "shown": _print.printable,
        "number": "{:,}".format,
        "counted": counted,
        "moment": _moment,
        "stored": _stored,
    }
    style, script = _part("page.css"), _part("page.js")
    types, comparison = _types(found), _comparison(found)
    kinds = {row["key"][0] for row in comparison["rows"]} | {each["id"] for each in types}
    page = environment.from_string(_part("page.html")).render(
        found=found,
        title=_title(found),
        version=__version__,
        style=Markup(style),  # noqa: S704 - our own
        script=Markup(script),  # noqa: S704 - our own
        policy=_policy(style, script),
        types=types,
        one_type=len(types) == len(kinds) == 1,  # a heading says which, and no row is of another
        series=_series(found),
        no_sum=_print.NO_SUM,
        **comparison,
    )
    # A lone surrogate, which JSON can hold, is already shown as its escape.
    return page.encode()


def _part(name: str) -> str:
    return (files(__name__) / name).read_text(encoding="utf-8")


def _policy(style: str, script: str) -> str:
    """Allow this style and this script, and nothing else: no network, no other script, no form."""
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    return (
        f"default-src 'none'; style-src 'sha256-{style_hash}'; script-src 'sha256-{script_hash}';"
        " img-src data:; base-uri 'none'; form-action 'none'"
    )


def _moment(moment: datetime | None) -> str:
    return "now" if moment is None else f"{moment.day} {moment:%b %Y, %H:%M} UTC"


def _stored(milliseconds: int) -> str:
    return f"{datetime_from_ms(milliseconds):%Y-%m-%d %H:%M:%S}"


def _day(moment: datetime) -> str:
    return f"{moment.day} {moment:%b %Y}"


def _title(found: Findings) -> str:
    start, end = found.start, found.end
    if start is None:
        return "Usage"
    if end is None:
        return f"Usage since {_moment(start)}"
    beyond = end + timedelta(milliseconds=1)
    if start.time() != datetime.min.time() or beyond.time() != datetime.min.time():
        return f"Usage from {_moment(start)} to {_moment(end)}"
    if start.day == beyond.day == 1 and (beyond - start).days <= 31:
        return f"Usage in {start:%B %Y}"
    return (
        f"Usage on {_day(start)}"
        if start.date() == end.date()
        else f"Usage from {_day(start)} to {_day(end)}"
    )


def _types(found: Findings) -> list[dict[str, Any]]:
    """Return each activity type with its billing IDs that have most users."""
    counted = found.counted()
    types = []
    for kind, (users, groups) in found.totals().items():
        ranked = found.ranked(kind, _TOP)
        top = max((count for _, count in ranked), default=0) or 1
        bars = [
            {
                "billing_id": billing_id,
                "count": count,
                "width": f"{count / top:.2%}",
                "spark": spark(
                    [None if step is None else step.get((kind, billing_id), 0) for step in counted]
                ),
            }
            for billing_id, count in ranked
        ]
        rest = users - sum(count for _, count in ranked)
        types.append({"id": kind, "users": users, "groups": groups, "bars": bars, "rest": rest})
    return types


def _series(found: Findings) -> list[dict[str, Any]]:
    """Return for each activity type its columns: unique users of all billing IDs, step by step."""
    if found.by is None:
        return []
    names = [_step_name(step.span, found.by) for step in found.steps]
    shown = []
    for kind, values in found.series().items():
        shown.append(
            {
                "id": kind,
                "top": top_of(values),
                "columns": columns(values, names, [_label(step.span, found.by) for step in found.steps]),
                "rows": list(zip(names, values, found.steps, strict=True)),
            }
        )
    return shown


def _label(span: Span, by: By) -> str:
    return f"{span.start:%b %Y}" if by == "month" else f"{span.start.day} {span.start:%b}"


def _step_name(span: Span, by: By) -> str:
    if by == "month":
        return f"{span.start:%B %Y}"
    if by == "week":
        return f"{_day(span.start)} to {_day(span.end)}"
    return f"{span.start:%a} {_day(span.start)}"


def _comparison(found: Findings) -> dict[str, Any]:
    """Return the rows of all numbers, and what the outbox says of them."""
    usage = {(row.activity_type_id, row.billing_id): row.unique for row in found.usage.rows()}
    compared = found.reconciliation
    if compared is None:
        rows = [_row(found, key, {"per_unique": count}, None) for key, count in usage.items()]
        return {"rows": _sorted(rows), "counts": {"per_unique": "unique users"}, "verdicts": {}, "notes": []}
    names = [name for name in _COUNTS if name in _ALWAYS or any(getattr(row, name) for row in compared)]
    rows = [
        _row(found, (row.activity_type_id, row.billing_id), {name: getattr(row, name) for name in names}, row)
        for row in compared
    ]
    notes = sorted((row for row in rows if row["note"]), key=lambda row: _VERDICTS.index(row["verdict"]))
    return {
        "rows": _sorted(rows),
        "counts": {name: _COUNTS[name] for name in names},
        "verdicts": _verdicts(compared),
        "notes": notes[:_NOTES],
        "more_notes": len(notes[_NOTES:]),
    }


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: (-row["counts"]["per_unique"], row["key"]))


def _verdicts(compared: Reconciliation) -> dict[str, int]:
    counts = dict.fromkeys(_VERDICTS, 0)
    for row in compared:
        counts[row.verdict] += 1
    return counts


def _row(found: Findings, key: Key, counts: dict[str, int], row: ReconciliationRow | None) -> dict[str, Any]:
    return {
        "key": key,
        "counts": counts,
        "verdict": None if row is None else row.verdict,
        "note": "" if row is None else row.note,
        "command": [] if row is None else found.command(key),
    }
