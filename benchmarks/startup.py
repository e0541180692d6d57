"""What a program pays once: the import, constructing a queue, and its first ``record()``.

Each figure comes from fresh interpreters, one after the other.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from _frame import Row, figure, fresh, options, table, write

TIMES = 15
OUTBOXES = {
    "a new outbox, drain=False": ("new", []),
    "a new outbox": ("new", ["drain"]),
    "an existing outbox, drain=False": ("existing", []),
    "an existing outbox": ("existing", ["drain"]),
}


def measure(times: int) -> list[Row]:
    """Return each step's milliseconds, of so many fresh interpreters."""
    found: dict[tuple[str, str], list[float]] = {}

    def add(group: str, *arguments: object) -> None:
        for step, value in fresh("_startup_steps.py", *arguments).items():
            found.setdefault((group, step), []).append(round(value, 2))

    with tempfile.TemporaryDirectory() as folder:
        used = Path(folder, "existing.db")
        fresh("_startup_steps.py", "calls", used)
        for number in range(times):
            add("imports", "imports")
            for name, (which, drain) in OUTBOXES.items():
                unused = Path(folder, f"{number}{''.join(drain)}.db")
                add(name, "calls", used if which == "existing" else unused, *drain)
    return [
        Row(group=group, case=step, unit="ms", metrics={"a fresh interpreter": values})
        for (group, step), values in found.items()
    ]


def main() -> None:
    """Measure, print and write."""
    given = options(__doc__ or "").parse_args()
    rows = measure(1 if given.smoke else TIMES)
    head = ["milliseconds, in fresh interpreters", "", "median", "lowest", "highest"]
    lines = []
    for row in rows:
        (values,) = row.metrics.values()
        ends = (statistics.median(values), min(values), max(values))
        lines.append([row.group, row.case, *map(figure, ends)])
    print(table(head, lines))
    write(given.json, "startup", rows)


if __name__ == "__main__":
    main()
