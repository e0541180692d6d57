from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perqueue import ConfigurationError, Report, ReportRow
from perqueue._report import report_period

DOCUMENTED = {
    "start": "2018-12-01T00:00:00.000Z",
    "end": "2018-12-31T23:59:59.999Z",
    "activityTypes": {"TYPE_A": {"billingIds": {"GROUP_A": {"unique": 59}, "GROUP_B": {"unique": 538}}}},
}
TWO_TYPES = {
    "activityTypes": {
        "TYPE_A": {"billingIds": {"GROUP_A": {"unique": 59}}},
        "TYPE_B": {"billingIds": {"GROUP_A": {"unique": 7}, "GROUP_C": {"unique": 1}}},
    }
}
DAY = datetime(2018, 12, 1, tzinfo=UTC)


def test_the_documented_answer_is_understood():
    """Rows, period and raw answer are those of Per's documentation ("Reporting")."""
    report = Report(DOCUMENTED)
    assert report.rows() == [
        ReportRow(activity_type_id="TYPE_A", billing_id="GROUP_A", unique=59),
        ReportRow(activity_type_id="TYPE_A", billing_id="GROUP_B", unique=538),
    ]
    assert report.start == DAY
    assert report.end == datetime(2018, 12, 31, 23, 59, 59, 999_000, tzinfo=UTC)
    assert report.raw is DOCUMENTED
    assert report.unique("GROUP_B") == 538


def test_rows_are_the_callers_own():
    """Changing the list that `rows()` gave changes nothing in the report."""
    report = Report(DOCUMENTED)
    report.rows().clear()
    assert len(report.rows()) == 2


def test_a_billing_id_that_per_does_not_list_has_no_users():
    """No row means zero users."""
    assert Report(DOCUMENTED).unique("GROUP_Z") == 0
    assert Report(DOCUMENTED).unique("GROUP_A", "TYPE_Z") == 0


def test_unique_takes_the_queues_own_type():
    """Without a type, the queue's own is meant, even if the report has only others."""
    assert Report(TWO_TYPES, "TYPE_B").unique("GROUP_A") == 7
    assert Report(TWO_TYPES, "TYPE_C").unique("GROUP_A") == 0
    assert Report(TWO_TYPES, "TYPE_B").unique("GROUP_A", "TYPE_A") == 59


def test_unique_does_not_add_up_types():
    """Users of several types may be the same people: without a type there is no answer, but an error."""
    with pytest.raises(ConfigurationError, match="2 activity types"):
        Report(TWO_TYPES).unique("GROUP_C")


@pytest.mark.parametrize(
    "raw", [{}, {"activityTypes": None}, {"activityTypes": {}}, {"start": None, "end": None}]
)
def test_an_empty_report_has_no_rows(raw):
    """Blank fields are null (Per's documentation, "Overview"), and mean nothing is there."""
    report = Report(raw)
    assert report.rows() == []
    assert report.unique("GROUP_A") == 0
    assert report.start is None
    assert report.end is None


@pytest.mark.parametrize("billing_ids", [None, {}])
def test_a_type_without_billing_ids_has_no_rows(billing_ids):
    """A type that nobody used is listed without rows."""
    assert Report({"activityTypes": {"TYPE_A": {"billingIds": billing_ids}}}).rows() == []


@pytest.mark.parametrize("unique", ["59", 59.5, None, True, -1, [], {}])
def test_a_number_of_users_that_is_none_is_not_a_report(unique):
    """A count that is no whole number is an error, never a silent zero."""
    with pytest.raises(ValueError):
        Report({"activityTypes": {"TYPE_A": {"billingIds": {"GROUP_A": {"unique": unique}}}}})


@pytest.mark.parametrize("text", ["2018-13-01T00:00:00Z", "yesterday", "", 7, None])
def test_a_period_that_cannot_be_read_is_none(text):
    """An odd date in an answer spoils no counts."""
    report = Report({"start": text, "end": text, "activityTypes": {}})
    assert (report.start, report.end) == (None, None)


def test_a_report_can_be_compared_and_shown():
    """Equal answers are equal reports, and the repr shows the raw answer."""
    assert Report(DOCUMENTED) == Report(dict(DOCUMENTED))
    assert Report(DOCUMENTED) != Report(TWO_TYPES)
    assert "GROUP_A" in repr(Report(DOCUMENTED))


# --- The period that is asked for ---


def test_without_dates_nothing_is_sent():
    """Neither date: Per reports the whole prior calendar month."""
    assert report_period(None, None) == {}


@pytest.mark.parametrize(
    ("moment", "sent"),
    [
        ("2018-12-01T00:00:00Z", "2018-12-01T00:00:00Z"),
        ("2018-12-01T00:00:00.000Z", "2018-12-01T00:00:00Z"),
        ("2018-12-31T23:59:59.999Z", "2018-12-31T23:59:59.999Z"),
        ("2018-12-01T01:00:00+01:00", "2018-12-01T00:00:00Z"),
        ("2018-11-30T19:00:00-05:00", "2018-12-01T00:00:00Z"),
        ("20181201T000000Z", "2018-12-01T00:00:00Z"),
        (DAY, "2018-12-01T00:00:00Z"),
        (DAY.replace(microsecond=1), "2018-12-01T00:00:00Z"),
        (DAY.replace(microsecond=999_999), "2018-12-01T00:00:00.999Z"),
        (DAY.astimezone(timezone(timedelta(hours=5, minutes=30))), "2018-12-01T00:00:00Z"),
    ],
)
def test_dates_are_sent_as_per_documents_them(moment, sent):
    """Aware datetimes and ISO strings, with or without milliseconds, become UTC with a Z."""
    assert report_period(moment, None) == {"start": sent}


def test_start_and_end_are_both_sent():
    """A period has two ends."""
    assert report_period(DAY, DAY + timedelta(days=1)) == {
        "start": "2018-12-01T00:00:00Z",
        "end": "2018-12-02T00:00:00Z",
    }
    assert report_period(DAY, DAY) == {"start": "2018-12-01T00:00:00Z", "end": "2018-12-01T00:00:00Z"}


def test_an_end_needs_a_start():
    """`start` is required if `end` is given (Per's documentation, "Reporting")."""
    with pytest.raises(ConfigurationError, match="needs a start"):
        report_period(None, DAY)


def test_a_period_does_not_run_backwards():
    """A start after the end is a mistake, told before anything is sent."""
    with pytest.raises(ConfigurationError, match="after its end"):
        report_period(DAY + timedelta(days=1), DAY)


@pytest.mark.parametrize(
    "naive",
    [datetime(2018, 12, 1), "2018-12-01T00:00:00", "2018-12-01", "2018-12-01T00:00:00.123"],  # noqa: DTZ001
)
def test_a_naive_date_is_refused(naive):
    """Without a time zone a date is a guess: it is refused with the remedy in its text."""
    with pytest.raises(ConfigurationError, match="time zone"):
        report_period(naive, None)
    with pytest.raises(ConfigurationError, match="end needs a time zone"):
        report_period(DAY, naive)


@pytest.mark.parametrize(
    "nonsense", ["", "yesterday", "2018-13-01T00:00:00Z", "1543622400", "2018-12-01T00:00:00Q"]
)
def test_a_text_that_is_no_date_is_refused(nonsense):
    """A text that is not ISO 8601 is an error that shows the form."""
    with pytest.raises(ConfigurationError, match="ISO 8601"):
        report_period(nonsense, None)


@pytest.mark.parametrize(
    "other", [0, 1543622400, 1.5, b"2018-12-01T00:00:00Z", DAY.date(), timedelta(days=1), True]
)
def test_what_is_no_moment_is_refused(other):
    """Numbers, dates without a time and bytes are refused by type."""
    with pytest.raises(ConfigurationError, match="must be an aware datetime"):
        report_period(other, None)


@given(st.datetimes(min_value=datetime(1, 1, 3), max_value=datetime(9999, 12, 29), timezones=st.timezones()))  # noqa: DTZ001
def test_any_aware_moment_is_sent_as_the_same_millisecond(moment):
    """What is sent is the moment that was meant, cut to whole milliseconds."""
    sent = datetime.fromisoformat(report_period(moment, None)["start"])
    assert timedelta(0) <= moment - sent < timedelta(milliseconds=1)


@given(st.text())
def test_any_text_is_a_date_or_an_error(text):
    """A text is sent as a date or refused with `ConfigurationError`, nothing else."""
    with suppress(ConfigurationError):
        assert set(report_period(text, None)) == {"start"}


@pytest.mark.parametrize("moment", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_a_moment_beyond_the_calendar_is_refused(moment):
    """A date that has no UTC form is a `ConfigurationError` like any other wrong date."""
    with pytest.raises(ConfigurationError):
        report_period(moment, None)
