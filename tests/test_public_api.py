"""The one public door: its names, its exceptions, and what importing it costs."""

import pickle
import subprocess
import sys
import types

import pytest

import perqueue
from perqueue import (
    Activity,
    ActivityRejected,
    AuthenticationError,
    ConfigurationError,
    FlushTimeout,
    InvalidActivity,
    OutboxError,
    OutboxFull,
    OutboxMismatch,
    PerAPIError,
    PerQueueError,
    QueueClosed,
)

EXCEPTIONS = [
    each for each in vars(perqueue).values() if isinstance(each, type) and issubclass(each, Exception)
]


def test_the_public_names_are_those_of_the_contract():
    """Programs are written against these names: one more or one fewer is a decision."""
    assert perqueue.__all__ == [
        "Activity",
        "ActivityRecord",
        "ActivityRejected",
        "AsyncPerClient",
        "Attempt",
        "AuthenticationError",
        "ConfigurationError",
        "DrainState",
        "FlushTimeout",
        "InvalidActivity",
        "OutboxError",
        "OutboxFull",
        "OutboxMismatch",
        "PerAPIError",
        "PerClient",
        "PerQueue",
        "PerQueueError",
        "QueueClosed",
        "Receipt",
        "Reconciliation",
        "ReconciliationRow",
        "Report",
        "ReportRow",
        "RetryPolicy",
        "Stats",
        "__version__",
    ]


def test_nothing_else_is_public():
    """Every name without an underscore is listed in `__all__`, submodules apart."""
    names = {
        name
        for name, value in vars(perqueue).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert names == set(perqueue.__all__) - {"__version__"}


def test_every_exception_has_the_one_base():
    """`except PerQueueError` catches all that perqueue raises."""
    assert len(EXCEPTIONS) == 11
    assert all(issubclass(each, PerQueueError) for each in EXCEPTIONS)


@pytest.mark.parametrize(
    ("exception", "also"),
    [
        (ConfigurationError, ValueError),
        (InvalidActivity, ValueError),
        (FlushTimeout, TimeoutError),
        (OutboxFull, OutboxError),
        (OutboxMismatch, OutboxError),
        (OutboxMismatch, ConfigurationError),
        (AuthenticationError, PerAPIError),
    ],
)
def test_an_exception_is_also_what_a_program_expects(exception, also):
    """Those who know only the standard library's exceptions catch these too."""
    assert issubclass(exception, also)


@pytest.mark.parametrize("exception", EXCEPTIONS, ids=lambda each: each.__name__)
def test_an_exception_crosses_processes(exception):
    """An exception raised in a worker process arrives whole in its parent."""
    error = exception("what happened")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), vars(again)) == (exception, "what happened", vars(error))


def test_the_attributes_of_an_exception_cross_processes():
    """So does what an exception carries."""
    activity = Activity(id=1, billing_id="G", user_id="U", activity_type_id="T", recorded_at=1)
    for error in (
        FlushTimeout("m", pending=7, reason="r"),
        ActivityRejected("m", reason="r", activities=[activity]),
        AuthenticationError("m", status=401, code="c"),
        QueueClosed("m"),
    ):
        assert vars(pickle.loads(pickle.dumps(error))) == vars(error)


def test_importing_perqueue_is_light():
    """`import perqueue` loads none of its heavy dependencies: a hot path starts at once."""
    program = (
        "import sys, perqueue;"
        "print([name for name in ('asyncio', 'httpx', 'httpcore', 'sqlite_utils', 'click', 'aiohttp', 'ssl')"
        " if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_nothing_is_logged_unless_a_program_asks_for_it():
    """A library is silent: without configuration, not even a warning reaches stderr."""
    program = "import logging, perqueue; logging.getLogger('perqueue').error('no handler')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")
