"""Leases of two seconds: for tests in which a drainer's death must be noticed."""

from perqueue._delivery import drain
from perqueue._outbox.postgres import leases

LEASE = 2.0
_HEARTBEAT = 0.4


def shorten(replace=setattr):
    """Let drainers of this process have short leases, and extend them and look around as often."""
    look_around = drain.Drain._look_around

    def often(self):
        look_around(self)
        self._next_tick = min(self._next_tick, self._clock.monotonic() + _HEARTBEAT)

    replace(leases, "LEASE", LEASE)
    replace(leases, "_LOOK_ASLEEP", LEASE / 2)
    replace(leases, "GIVE_WAY", LEASE / 2)
    replace(drain.Drain, "_look_around", often)
