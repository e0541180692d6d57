"""How high the columns of the report's page are."""

import pytest

from perqueue.cli._page.charts import columns, spark, top_of


@pytest.mark.parametrize(
    ("highest", "top"), [(0, 1), (1, 1), (3, 4), (10, 10), (11, 12), (99, 100), (101, 120), (1_234, 1_600)]
)
def test_the_top_of_a_chart_is_round(highest, top):
    """The scale ends at a round number that no column exceeds."""
    assert top_of([None, highest, 0]) == top


def test_the_smallest_number_is_still_to_be_seen():
    """A column is as high as its number, one that would be too thin to see a little higher, none for 0."""
    made = columns([1000, 500, 1, 0, None], "abcde", "abcde")
    assert [each["height"] for each in made] == ["100.00%", "50.00%", "1.50%", "0.00%", "0.00%"]
    assert [each["y"] for each in made] == ["0.00%", "50.00%", "98.50%", "100.00%", "100.00%"]
    assert [each["height"] for each in spark([200, 0, 1])] == ["100.0%", "1.5%"]


@pytest.mark.parametrize("count", [1, 7, 8, 31, 400])
def test_labels_have_room(count):
    """However many columns there are, at most seven have a label."""
    names = [str(number) for number in range(count)]
    labels = [each["label"] for each in columns([1] * count, names, names) if each["label"]]
    assert labels[0] == "0"
    assert len(labels) <= min(count, 7)
