"""Per itself, without faults and without HTTP: requests in, answers out."""

import itertools
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from perqueue.sandbox._ledger import Ledger, ReceivedActivity
from perqueue.sandbox._period import (
    REST_OF_MILLISECOND,
    format_timestamp,
    parse_timestamp,
    prior_month,
)
from perqueue.sandbox._wire import (
    BAD_TOKEN,
    Answer,
    Query,
    accepted,
    json_answer,
    only,
    refused,
)


@dataclass(kw_only=True)
class Per:
    """The API's rules. The reasons of refusals, `invalid_auth_token` apart, are the sandbox's own."""

    ledger: Ledger
    tokens: Mapping[str, frozenset[str]]
    activity_types: Collection[str] | None
    clock: Callable[[], datetime]

    def __post_init__(self) -> None:
        """Prepare transaction IDs that no other sandbox will give."""
        self._transaction_ids = (
            f"{prefix}{number:010x}" for prefix in [secrets.token_hex(5)] for number in itertools.count(1)
        )

    def may(self, token: str | None, scope: str) -> bool:
        """Tell whether this token has this scope."""
        return token is not None and scope in self.tokens.get(token, ())

    def add(
        self, token: str | None, query: Query | None, now: datetime
    ) -> tuple[Answer, ReceivedActivity | None]:
        """Answer `activities.add`; the activity is there if and only if it is accepted."""
        if not self.may(token, "activity"):
            return BAD_TOKEN, None
        if query is None:
            return refused("invalid_query"), None
        billing_id = only(query, "billingId")
        if billing_id is None:
            return refused("invalid_billing_id"), None
        user_id = only(query, "userId")
        if user_id is None:
            return refused("invalid_user_id"), None
        type_id = only(query, "activityTypeId")
        if type_id is None or not (self.activity_types is None or type_id in self.activity_types):
            return refused("invalid_activity_type_id"), None
        activity = ReceivedActivity(
            billing_id=billing_id,
            user_id=user_id,
            activity_type_id=type_id,
            transaction_id=next(self._transaction_ids),
            received_at=now,
        )
        return accepted(activity.transaction_id), activity

    def report(self, token: str | None, query: Query | None, now: datetime) -> Answer:
        """Answer `reports.get`: unique users by real arrival time, both ends included."""
        if not self.may(token, "reporting"):
            return BAD_TOKEN
        if query is None:
            return refused("invalid_query")
        period: dict[str, datetime | None] = {"start": None, "end": None}
        for name in ("start", "end"):
            if any(query.get(name, ())):  # a blank parameter is one that is not given
                moment = parse_timestamp(only(query, name) or "")
                if moment is None:
                    return refused(f"invalid_{name}")
                period[name] = moment
        start, end = period["start"], period["end"]
        if start is None:
            if end is not None:
                return refused("missing_start")
            start, end = prior_month(now)
        last = None if end is None else end + REST_OF_MILLISECOND
        users = self.ledger.users(start, last)
        return json_answer(
            {
                "ok": True,
                "result": {
                    "start": format_timestamp(start),
                    "end": None if end is None else format_timestamp(end),
                    "activityTypes": {
                        type_id: {
                            "billingIds": {
                                billing_id: {"unique": len(ids)} for billing_id, ids in groups.items()
                            }
                        }
                        for type_id, groups in users.items()
                    },
                },
            }
        )
