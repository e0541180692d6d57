"""What ``record()`` costs beside what else a program could call, from one thread that does nothing else.

``tuned insert`` is SQLite by hand with all that perqueue does for speed and nothing of what it does for
safety: no validation, checksum, receipt, look for a deleted file, or room check. Ratios are to that.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import _peers
import _rounds

if TYPE_CHECKING:
    from pathlib import Path

CALLS = 20_000


def measure(peer: _peers.Peer, folder: Path, part: float) -> _rounds.Metrics:
    """Return percentiles of one peer's calls."""
    with peer(folder) as call:
        return _rounds.percentiles(_rounds.timed(call, int(CALLS * part)))


if __name__ == "__main__":
    _rounds.main(
        "record",
        "record.py",
        "What recording one event costs, one right after the other.",
        (
            _rounds.Case(
                group="one event, one thread",
                name=name,
                survives=survives,
                base=name == "tuned insert",
                run=functools.partial(measure, peer),
            )
            for name, (peer, survives) in _peers.PEERS.items()
        ),
    )
