"""What can go wrong, as plain data. Each fault says whether an activity that meets it counts.

That is its field `accept`: fixed where only one value makes sense, an option elsewhere. An activity that
is accepted stands in the ledger at its arrival, before anything happens to the answer.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Final


@dataclass(frozen=True)
class Fault:
    """What all faults have in common: a name for the request log and for the remote control."""

    name: ClassVar[str]
    accept: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Refuse what no server could do."""
        for option, value in vars(self).items():
            if option in _LEAST and value is not None and not _LEAST[option] <= value < math.inf:
                raise ValueError(
                    f"{self.name}: {option} must be at least {_LEAST[option]} and finite, not {value!r}"
                )
            if option in {"code", "status"} and not 200 <= value <= 599:
                raise ValueError(f"{self.name}: {option} must be an HTTP status, 200 to 599, not {value!r}")


_LEAST: Final = {"seconds": 0, "interval": 0, "size": 0, "per_second": 1e-6, "burst": 1}
