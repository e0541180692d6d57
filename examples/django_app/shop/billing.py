"""Counting users for Per."""

from django.apps import apps
from django.db import transaction


def count(company: str, user: str) -> None:
    """Record an activity once the transaction is committed; at once where there is none.

    What is rolled back is not counted. A failure to record is logged by Django, and costs the user nothing.
    """

    def record() -> None:  # no partial(): Django needs a function's name to log its failure
        apps.get_app_config("shop").queue.record(company, user)

    transaction.on_commit(record, robust=True)
