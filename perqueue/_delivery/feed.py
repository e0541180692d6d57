"""What to send next: a few hundred claimed activities in memory, whatever the backlog."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from perqueue._stats import Gate

if TYPE_CHECKING:
    from collections.abc import Collection

    from perqueue._activity import Activity
    from perqueue._clock import Clock
    from perqueue._delivery.pace import Pace
    from perqueue._outbox import Outbox

_MOST_SUSPECTS = 64
_AHEAD = 2.0
"""Seconds for which to claim ahead at the rate that Per takes: what is claimed no other drainer may send."""
_LEAST_AHEAD = 4
_SET_BACK_MS = 1000
"""Milliseconds by which the wall clock falls behind the monotonic one when somebody has set it."""


class Feed:
    """Claims activities, oldest first, and hands them out one by one.

    An activity is outstanding from its claim until :meth:`leave`. One that fails while nothing gets
    through is a suspect: the next probe is another one, since the outage may be only its own.
    """

    def __init__(self, outbox: Outbox, pace: Pace, clock: Clock, activity_cap: float, cursor: int) -> None:
        self._outbox = outbox
        self._pace = pace
        self._clock = clock
        self._cap_ms = int(activity_cap * 1000)
        self._cursor = cursor
        self._ready: deque[Activity] = deque()
        self._suspects: deque[Activity] = deque()
        self._failed_at: dict[int, float] = {}
        self._outstanding: dict[int, Activity] = {}
        self._next_due: int | None = None
        self._recheck_due = True
        self._sweep: int | None = None
        self._drift = self._clocks_apart()
        self._newest_probed = 0
        self._from_end = True
        self.fresh = True
        """Whether there may be activities above the cursor; set by ``record()`` from any thread."""

    def __len__(self) -> int:
        return len(self._ready) + len(self._suspects)

    def waiting(self) -> bool:
        """Tell whether anything is claimed, or waits in the outbox on its own account."""
        return bool(self._ready or self._suspects or self._next_due is not None or self._recheck_due)

    def untried(self) -> bool:
        """Tell whether there is anything to send that has not failed on its own account."""
        return self.fresh or any(not activity.attempts for activity in self._ready)

    def hungry(self) -> bool:
        """Tell whether more should be claimed."""
        return len(self._ready) < self._low_water()

    def look_again(self, *, all_due: bool = False) -> None:
        """Look for what other processes recorded or requeued; or claim whatever waits on its own account."""
        self.fresh = True
        self._recheck_due = True
        if all_due:
            self._sweep = 0

    def fill(self) -> None:
        """Claim enough for every request that may be in flight."""
        if self.hungry():
            want = 2 * self._low_water() - len(self._ready)
            came = self._claim_fresh(want // 2)
            # Known offenders get half the room, so that there is always some for the others.
            offenders = sum(1 for activity in self._ready if activity.attempts)
            due = self._claim_due(min(want - came, self._low_water() // 2 - offenders))
            came += self._claim_fresh(want - came - due)
            if came and self._pace.gate is Gate.BACKING_OFF and len(self._suspects) <= 1:
                # What failed are known offenders and one more: ask with another before calling it an outage.
                self._pace.wake()
        if self._pace.gate is Gate.REFUSED and not self._pace.wait():
            self._take_newest()

    def next(self) -> Activity | None:
        """Hand out an activity: in its turn, or while nothing gets through, one that can best tell why."""
        if not self._ready:
            return self._suspects.popleft() if self._suspects else None
        return self._ready.popleft() if self._pace.gate is None else self._best_probe()

    def _best_probe(self) -> Activity:
        """Take out one that has never failed on its own account, if there is one.

        In an outage from either end in turn: however many bad ones lie before a good one, it is found.
        """
        backwards = self._pace.gate is Gate.BACKING_OFF and self._from_end
        self._from_end = not self._from_end
        places = range(len(self._ready))[:: -1 if backwards else 1]
        place = next((i for i in places if not self._ready[i].attempts), places[0])
        activity = self._ready[place]
        del self._ready[place]
        return activity

    def put_back(self, activity: Activity, *, behind: int | None = None) -> None:
        """Keep an activity whose failure says nothing about it; hand it out last, or behind so many."""
        self._ready.insert(len(self._ready) if behind is None else behind, activity)

    def suspect(self, activity: Activity) -> None:
        """Keep an activity that failed while nothing got through."""
        self._failed_at[activity.id] = self._clock.monotonic()
        self._suspects.append(activity)

    def crowded(self) -> bool:
        """Tell whether there are as many suspects as memory allows: another one waits on its own account."""
        return len(self._suspects) >= _MOST_SUSPECTS

    def failed_at(self, activity: Activity) -> float:
        """Return when it failed before (monotonic seconds); infinity if it did not."""
        return self._failed_at.get(activity.id, float("inf"))

    def acquit(self) -> None:
        """Requests flow again: suspects are sent in their turn."""
        self._ready = deque(sorted([*self._suspects, *self._ready], key=lambda activity: activity.id))
        self._suspects.clear()

    def watermark(self, leaving: Collection[int]) -> int:
        """Return the ID up to which nothing is outstanding once these have left."""
        staying = min((i for i in self._outstanding if i not in leaving), default=self._cursor + 1)
        return min(self._cursor, staying - 1)

    def leave(self, activity_ids: Collection[int]) -> None:
        """Forget activities that were settled, or that now wait in the outbox on their own account."""
        for activity_id in activity_ids:
            self._outstanding.pop(activity_id, None)
            self._failed_at.pop(activity_id, None)

    def _low_water(self) -> int:
        plenty, rate = 2 * self._pace.limit + 8, self._pace.rate
        return plenty if rate is None else min(plenty, max(_LEAST_AHEAD, int(_AHEAD * rate)))

    def _claim_fresh(self, want: int) -> int:
        if not self.fresh or want < 1:
            return 0
        self.fresh = False  # before the look: a record() during it sets it again
        try:
            least = self._outbox.claim_batch if self._pace.rate is None else 1
            claimed = self._outbox.claim(self._cursor, max(want, least))
        except BaseException:
            self.fresh = True
            raise
        if not claimed:
            return 0
        self.fresh = True
        self._cursor = max(self._cursor, claimed[-1].id)  # others' may lie below: a dead drainer's, say
        return self._take(claimed)

    def _claim_due(self, want: int) -> int:
        if want < 1:
            return 0
        before, self._drift = self._drift, self._clocks_apart()
        if self._drift < before - _SET_BACK_MS:
            self._sweep = 0  # the wall clock was set back: the times that are stored have lost their meaning
        if self._sweep is not None:  # each once, by ID, whatever its time: what fails again has had its turn
            claimed = self._outbox.claim_waiting(self._sweep, want)
            self._sweep = claimed[-1].id if claimed else None
            return self._take(claimed)
        now = self._clock.time_ms()
        farthest = now + self._cap_ms
        if self._recheck_due:
            self._next_due = self._outbox.next_due()
            self._recheck_due = False
        due = self._next_due
        if due is None or now < due <= farthest:
            return 0
        claimed = self._outbox.claim_due(now, farthest, want, self._outstanding)
        self._recheck_due = True
        return self._take(claimed)

    def _clocks_apart(self) -> int:
        return self._clock.time_ms() - int(self._clock.monotonic() * 1000)

    def _take_newest(self) -> None:
        """Probe with what was recorded last: it is likeliest to have a corrected activity type."""
        newest = self._outbox.claim_newest()
        self._take(newest)
        for activity in newest:
            if activity.id <= self._newest_probed:
                continue  # it has had its turn: now the others, in theirs
            with suppress(ValueError):  # it is under suspicion, or on its way
                self._ready.remove(activity)
                self._ready.appendleft(activity)
                self._newest_probed = activity.id

    def _take(self, claimed: list[Activity]) -> int:
        new = [activity for activity in claimed if activity.id not in self._outstanding]
        for activity in new:
            self._outstanding[activity.id] = activity
        self._ready.extend(new)
        return len(new)
