"""The promises of every outbox, kept by one in PostgreSQL: which of them are about files alone."""

_OF_A_FILE = {
    "test_a_damaged_one_stands_for_no_other": "a server has checksums of its own",
    "test_list": "looks into the file",
    "test_watching_delivers_what_others_record": "waits for the file",
    "test_a_drain_that_cannot_be_elected_says_why": "there is no election",
    "test_a_flush_never_takes_a_damaged_row_for_delivered": "a server has checksums of its own",
    "test_a_queue_that_was_never_used_does_nothing": "it registers as a drainer",
    "test_a_finalizer_within_a_transaction_is_told": "there is no connection that it could interrupt",
    "test_ten_threads_record_while_another_closes": "looks into the file",
    "test_whoever_asks_comes_before_a_drainer_with_a_bad_token": "there is no election",
}
"""Tests of the file, and why no database has to pass them."""


def pytest_collection_modifyitems(config, items):
    """Leave out what is about files alone."""
    here = [item for item in items if "conformance/" in item.nodeid]
    left_out = [item for item in here if item.originalname in _OF_A_FILE]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
