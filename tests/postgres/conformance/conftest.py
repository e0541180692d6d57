"""The promises of every outbox, kept by one in PostgreSQL: which of them are about files alone."""

import os

_OF_A_FILE = {
    "test_a_damaged_one_stands_for_no_other": "a server has checksums of its own",
    "test_list": "looks into the file",
    "test_watching_delivers_what_others_record": "waits for the file",
    "test_a_drain_that_cannot_be_elected_says_why": "there is no election",
    "test_a_flush_never_takes_a_damaged_row_for_delivered": "a server has checksums of its own",
    "test_a_queue_that_was_never_used_does_nothing": "it registers as a drainer",
    "test_a_finalizer_within_a_transaction_is_told": "there is no connection that it could interrupt",
    "test_ten_threads_record_while_another_closes": "looks into the file",
}
"""Tests of the file, and why no database has to pass them."""


_LONG = {
    "test_outage.py",
    "test_closing.py",
    "test_cli_drain.py",
    "test_recording_while_flushing_loses_nothing",
    "test_none_waits_without_limit",
    "test_flushing_in_an_outage_is_no_storm",
    "test_the_queues_own_timeout_is_the_default",
    "test_processes_and_restarts_share_a_window",
    "test_every_flush_makes_one_fresh_try",
    "test_ten_poison_activities_hold_up_nobody",
    "test_many_receipts_are_gathered",
    "test_a_wait_ends_at_its_timeout_and_says_why",
}
"""Half a minute for what the drain does alike with every outbox: `make soak` runs them here, too."""


def pytest_collection_modifyitems(config, items):
    """Leave out what is about files alone."""
    here = [item for item in items if "conformance/" in item.nodeid]
    left_out = [item for item in here if item.originalname in _OF_A_FILE]
    if "PERQUEUE_SOAK" not in os.environ:
        left_out += [item for item in here if _LONG & {item.path.name, item.originalname}]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
