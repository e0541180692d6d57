"""What came of a request: what it means for the activity, and what for all the others."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from perqueue._activity import Event, Outcome, Verdict
from perqueue._delivery.pace import jittered
from perqueue._delivery.settler import REFUSAL_STREAK
from perqueue._receipt import token_complaint
from perqueue._stats import Gate
from perqueue.exceptions import OutboxError

if TYPE_CHECKING:
    from collections.abc import Callable

    from perqueue._activity import Activity
    from perqueue._clock import Clock
    from perqueue._complaints import Complaints
    from perqueue._delivery.feed import Feed
    from perqueue._delivery.pace import Pace
    from perqueue._delivery.settler import Settler
    from perqueue._settings import RetryPolicy

log = logging.getLogger("perqueue")

_OUTAGE = 5
"""Failures in a row that mean an outage even if each failed before, when nothing else is there to try."""
_LONG_WAIT = 30.0
"""Seconds that Per may ask to wait without a word in the log: short waits are how it limits the rate."""


_MOSTLY = 4
"""So many taken for each one refused mean that not all are limited, but only who is refused then."""


class _Throttles:
    """Tells an activity that is always one too many from a rate that is too high for Per."""

    def __init__(self) -> None:
        self._taken = self._refused = 0
        self._first: dict[int, list[int]] = {}

    def taken(self) -> None:
        """Per answered a request."""
        self._taken += 1

    def forget(self, activity_id: int) -> None:
        """It came to something else."""
        self._first.pop(activity_id, None)

    def refused(self, activity_id: int) -> bool:
        """Tell whether most of the others were taken since it was refused for the first time."""
        self._refused += 1
        first = self._first.setdefault(activity_id, [self._taken, self._refused - 1])
        first[1] += 1  # its own refusals do not count
        taken, others = self._taken - first[0], self._refused - first[1]
        return taken >= _MOSTLY * (1 + others)


class Judge:
    """Turns outcomes into what is to be stored, and tells the pace."""

    def __init__(
        self,
        feed: Feed,
        pace: Pace,
        settler: Settler,
        *,
        policy: RetryPolicy,
        complaints: Complaints,
        pending: Callable[[], int],
        clock: Clock,
    ) -> None:
        self._feed = feed
        self._pace = pace
        self._settler = settler
        self._policy = policy
        self._complaints = complaints
        self._pending = pending
        self._clock = clock
        self._failures = 0  # requests without an answer since the last answer
        self._excused: tuple[str | None, int] = (None, 0)
        self._throttles = _Throttles()
        self._repeats = False  # whether the latest probe was not told to whoever waits
        self.answered_at = float("-inf")
        """When Per answered last (monotonic seconds)."""
        self.woken_at = float("-inf")
        """When somebody asked last for a fresh attempt (monotonic seconds)."""
        self.token_refused = False
        """Whether Per refused the token: another process may have a better one."""

    def judge(self, activity: Activity, outcome: Outcome, sent_at: float) -> None:
        """Decide; ``sent_at`` is when the request was sent, in monotonic seconds."""
        reason = outcome.reason or "no reason"
        was_closed = self._pace.gate is not None
        if outcome.verdict is not Verdict.RATE_LIMITED:
            self._throttles.forget(activity.id)
        match outcome.verdict:
            case Verdict.ACCEPTED:
                if self._pace.gate is Gate.REFUSED:
                    # Not everything is refused: what is older and refused for that reason has earned it.
                    self._excused = (self._pace.reason, activity.id)
                self._got_through(sent_at)
                self._settler.end_streak()
                self._settler.put(activity, Event.ACCEPT, sent_at, transaction_id=outcome.transaction_id)
            case Verdict.REJECTED:
                self._refused(activity, reason, sent_at)
            case Verdict.BAD_TOKEN:
                self._without_token(activity, outcome, sent_at, reason)
            case Verdict.RATE_LIMITED:
                self._throttled(activity, outcome, sent_at, reason)
            case Verdict.NO_ANSWER:
                self._unanswered(activity, sent_at, reason)
        if was_closed and self._pace.gate is None:
            self._recovered()

    def _got_through(self, sent_at: float) -> None:
        self.answered_at = self._clock.monotonic()
        self._failures = 0
        self._throttles.taken()
        self._pace.answered(sent_at)

    def _refused(self, activity: Activity, reason: str, sent_at: float) -> None:
        if self._pace.gate is Gate.REFUSED and reason == self._pace.reason:
            self._feed.put_back(activity)  # nothing has changed: it is not this activity's fault
            self._settler.put(activity, Event.DEFER, sent_at, reason=reason)  # an attempt all the same
            if not self._owes_another(sent_at):
                self._pace.refused(sent_at, Gate.REFUSED, reason)
            return
        self._got_through(sent_at)
        earned = reason == self._excused[0] and activity.id <= self._excused[1]
        if not earned and not (activity.attempts and activity.reason == reason):
            # One that was taken back, and is refused again although others got through, does not count.
            self._settler.extend_streak(activity, reason)
        self._settler.put(activity, Event.REJECT, sent_at, reason=reason)
        if self._settler.is_streak:
            self._pace.refused(self._clock.monotonic(), Gate.REFUSED, reason)
            self._complaints.tell(
                Gate.REFUSED,
                logging.ERROR,
                f"Per refused {REFUSAL_STREAK} activities in a row for one reason, and accepted none:"
                " they stay pending, delivery is paused; `perqueue status` shows the reason, as a rule"
                " a wrong activity type: correct that, and restart the program",
            )

    def _without_token(self, activity: Activity, outcome: Outcome, sent_at: float, reason: str) -> None:
        """The token is at fault: this term ends, for another process may have a better one."""
        self._feed.put_back(activity)
        if outcome.status is not None:  # else the token's callable gave none, and nothing was sent
            self._settler.put(activity, Event.DEFER, sent_at, reason=f"bad token: {reason}")
        if self._pace.gate is Gate.BAD_TOKEN and self._owes_another(sent_at):
            return
        self.token_refused = True
        self._pace.refused(sent_at, Gate.BAD_TOKEN, reason)
        self._complaints.tell(
            Gate.BAD_TOKEN,
            logging.ERROR,
            f"{token_complaint(reason)} until a token works: give it one with the scope activity",
        )

    def _owes_another(self, sent_at: float) -> bool:
        """Tell whether somebody has asked since a probe was sent, and is owed one that begins now.

        Never twice in a row: however often somebody asks, whoever waits is told.
        """
        self._repeats = sent_at < self.woken_at and not self._repeats
        return self._repeats

    def _throttled(self, activity: Activity, outcome: Outcome, sent_at: float, reason: str) -> None:
        """It was one too many, or came at a wrong time: that is its own affair only if it always is."""
        alone = self._throttles.refused(activity.id)
        own = alone or (activity.attempts > 0 and activity.reason == reason)
        if alone:
            self._throttles.forget(activity.id)
            self._pace.throttled_alone()
        if own:
            self._failures += 1
            self._set_aside(activity, sent_at, reason)
        else:
            self._feed.put_back(activity, behind=_MOSTLY)
            self._settler.put(activity, Event.DEFER, sent_at, reason=reason)
        if outcome.retry_after is None and own and self._others_flow():
            return
        if outcome.retry_after is None or (outcome.status == 429 and not own):
            self._pace.throttled(sent_at, reason, outcome.retry_after)
        else:
            self._pace.asked_to_wait(reason, outcome.retry_after)
        if self._pace.gate is Gate.RETRY_AFTER and self._pace.wait() >= _LONG_WAIT:
            self._complaints.tell(
                Gate.RETRY_AFTER,
                logging.WARNING,
                f"Per asks to wait for {self._pace.wait():.0f} s ({reason}): everything is kept till then",
            )

    def _unanswered(self, activity: Activity, sent_at: float, reason: str) -> None:
        """Keep it pending: on its own account if others get through, else as a suspect of an outage."""
        self._failures += 1
        own = activity.attempts > 0 or self.answered_at > min(sent_at, self._feed.failed_at(activity))
        if own or self._feed.crowded():
            self._set_aside(activity, sent_at, reason)
        else:
            self._feed.suspect(activity)
            self._settler.put(activity, Event.DEFER, sent_at, reason=reason)
        if own and self._others_flow():
            if not activity.attempts:  # a known one's failure says nothing of Per
                self._pace.stumbled(sent_at)
        else:
            self._pace.failed(sent_at, reason)
            if self._pace.failures > 1:
                self._complaints.tell(
                    Gate.BACKING_OFF,
                    logging.WARNING,
                    f"Per does not answer ({reason}): everything is kept, retrying",
                )

    def _set_aside(self, activity: Activity, sent_at: float, reason: str) -> None:
        """Have it wait on its own account."""
        wait = jittered(self._policy.base, self._policy.activity_cap, activity.attempts + 1)
        if sent_at < self.woken_at:
            wait = 0.0  # whoever waits is owed an attempt that began after the asking
        until = self._clock.time_ms() + int(wait * 1000)
        self._settler.put(activity, Event.DEFER, sent_at, reason=reason, not_before=until)

    def _others_flow(self) -> bool:
        """Tell whether a failure of one activity on its own account says nothing of Per."""
        return self._pace.gate is None and (self._failures < _OUTAGE or self._feed.untried())

    def _recovered(self) -> None:
        """Requests flow again: whatever failed meanwhile is sent in its turn."""
        lasted = self._complaints.over(*Gate)
        if lasted is not None:
            try:
                pending = f"{self._pending():,} pending"
            except OutboxError:
                pending = "the outbox cannot be asked how many are pending"
            log.info("delivering again after %s: %s", lasted, pending)
        self._feed.acquit()
