"""Remote control under `/_sandbox/`: for a sandbox that runs in another process.

| request | does |
|---|---|
| `GET /_sandbox/state` | counts and the faults in force |
| `GET /_sandbox/activities` | all accepted activities |
| `PUT /_sandbox/fault` | puts a fault in force: `{"name": "status", "code": 503, "times": 5}` |
| `DELETE /_sandbox/fault` | ends all faults |
| `POST /_sandbox/release` | lets hanging requests go on |
| `POST /_sandbox/reset` | forgets activities, requests and faults |

Beside `name`, `times` and the fault's own parameters, `PUT` takes `endpoint` (as `Sandbox.set_fault()`
does) and `when`, a mapping such as `{"user_id": "USER_1"}` that the activity must match.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from perqueue.sandbox._catalog import make_fault
from perqueue.sandbox._delivery import whole
from perqueue.sandbox._fault_book import ActivityParameters, When
from perqueue.sandbox._period import format_timestamp
from perqueue.sandbox._wire import json_answer, refused

if TYPE_CHECKING:
    from collections.abc import Mapping

    from perqueue.sandbox._aiohttp import web
    from perqueue.sandbox._fault import Fault
    from perqueue.sandbox._ledger import ReceivedActivity

_PREFIX = "/_sandbox/"


class Controlled(Protocol):
    """What the remote control needs of a sandbox."""

    @property
    def activities(self) -> tuple[ReceivedActivity, ...]:
        """All accepted activities."""

    def state(self) -> Mapping[str, Any]:
        """Counts and faults."""

    def set_fault(
        self, fault: Fault, *, times: int | None = None, when: When | None = None, endpoint: str = ...
    ) -> None:
        """Put a fault in force."""

    def clear_faults(self) -> None:
        """End all faults."""

    def release(self) -> None:
        """Let hanging requests go on."""

    def reset(self) -> None:
        """Forget everything."""


class Control:
    """Serves the remote control."""

    def __init__(self, sandbox: Controlled) -> None:
        """Control this sandbox."""
        self._sandbox = sandbox

    async def __call__(self, request: web.BaseRequest, path: str) -> web.Response | None:
        """Answer a request under `/_sandbox/`, or return `None`: not one of ours."""
        if not path.startswith(_PREFIX):
            return None
        sandbox = self._sandbox
        match request.method, path.removeprefix(_PREFIX):
            case "GET", "state":
                return whole(json_answer(sandbox.state()))
            case "GET", "activities":
                return whole(json_answer([_plain(activity) for activity in sandbox.activities]))
            case "PUT", "fault":
                try:
                    self._set_fault(await request.read())
                except ValueError as error:
                    return whole(refused(str(error), status=400))
            case "DELETE", "fault":
                sandbox.clear_faults()
            case "POST", "release":
                sandbox.release()
            case "POST", "reset":
                sandbox.reset()
            case _:
                return None
        return whole(json_answer({"ok": True}))

    def _set_fault(self, body: bytes) -> None:
        wish = json.loads(body)
        if not (isinstance(wish, dict) and isinstance(wish.get("name"), str)):
            raise ValueError('a fault is a JSON object with a name: {"name": "status", "code": 503}')  # noqa: TRY004
        name = wish.pop("name")
        times = wish.pop("times", None)
        when = wish.pop("when", None)
        endpoint = wish.pop("endpoint", "activities.add")
        if not (times is None or type(times) is int):
            raise ValueError(f"times must be a whole number, not {times!r}")
        if not isinstance(endpoint, str):
            raise ValueError(f"endpoint must be one of the API's, not {endpoint!r}")  # noqa: TRY004
        self._sandbox.set_fault(make_fault(name, wish), times=times, when=_matcher(when), endpoint=endpoint)


def _matcher(wanted: Any) -> When | None:
    if wanted is None:
        return None
    names = ActivityParameters._fields
    if not (isinstance(wanted, dict) and wanted and set(wanted) <= set(names)):
        raise ValueError(f"when must be an object with some of {', '.join(names)}")
    return lambda activity: all(getattr(activity, name) == value for name, value in wanted.items())


def _plain(activity: ReceivedActivity) -> dict[str, str]:
    return {**asdict(activity), "received_at": format_timestamp(activity.received_at)}
