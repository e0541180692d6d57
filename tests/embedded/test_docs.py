"""The recipes of docs/transactional.md are programs: each section is run as one, against a local Per."""

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, Integer, MetaData, Table, Text, create_engine

from tests.helpers import Child, environment

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "transactional.md").read_text(encoding="utf-8")
SECTIONS = {
    title: "".join(re.findall(r"^```python\n(.*?)^```", body, re.DOTALL | re.MULTILINE))
    for title, body in re.findall(r"^##+ (\w[^\n]*)\n(.*?)(?=^##+ |\Z)", TEXT, re.DOTALL | re.MULTILINE)
}
RECIPES = [title for title, code in SECTIONS.items() if "PerQueue(" in code]


def test_every_recipe_is_run():
    """No recipe is left out because its section has another name."""
    assert sorted(RECIPES) == ["Async", "Django", "SQLAlchemy", "SQLite"]
    assert sum(code.count("PerQueue(") for code in SECTIONS.values()) == TEXT.count("PerQueue(")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe, tmp_path, per):
    """Typed in as it stands, it bills who has ordered, and nobody else."""
    app = tmp_path / "app.db"
    script = f"import os\nos.chdir({str(tmp_path)!r})\n{SECTIONS[recipe]}"
    with Child(script, env=environment(app, per), isolated=True) as child:
        assert child.succeed(30) == []
    with closing(sqlite3.connect(app)) as connection:
        assert connection.execute("SELECT customer FROM orders").fetchall() == [("CUSTOMER_1",)]
    assert [activity.user_id for activity in per.activities] == ["CUSTOMER_1"]


@pytest.mark.parametrize("mode", ["wal"], indirect=True)
def test_alembic_leaves_the_tables_alone(app, embed):
    """With the documented filter autogenerate proposes nothing for them; without it, it would drop them."""
    embed().close()
    names = {}
    exec(SECTIONS["Alembic"], names)
    metadata = MetaData()
    Table(
        "orders", metadata, Column("id", Integer, primary_key=True), Column("customer", Text, nullable=False)
    )
    engine = create_engine(f"sqlite:///{app}")

    def proposed(**options):
        with engine.connect() as connection:
            context = MigrationContext.configure(connection, opts=options)
            return str(compare_metadata(context, metadata))

    assert "perqueue" in proposed()
    assert "perqueue" not in proposed(include_name=names["include_name"])
    engine.dispose()
