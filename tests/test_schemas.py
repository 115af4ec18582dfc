"""Every version of the schema has a file in tests/schemas/, and migrates to the newest version."""

import sqlite3
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

import replies
import sql

SCHEMAS = sorted((Path(__file__).parent / "schemas").glob("v*.sql"), key=lambda path: int(path.stem[1:]))


def schema(path: Path) -> str:
    """Returns the SQL of all tables, indexes and triggers of a database, in order of creation, and its version."""
    with closing(sqlite3.connect(path)) as conn:
        rows = conn.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")
        statements = [f"{row[0]};\n" for row in rows]
        return "".join([*statements, f"PRAGMA user_version={conn.execute('PRAGMA user_version').fetchone()[0]};\n"])


def test_every_version_has_a_file() -> None:
    """For each migration there is a file tests/schemas/v<number>.sql."""
    assert [path.stem for path in SCHEMAS] == [f"v{number}" for number in range(1, len(sql.MIGRATIONS) + 1)]


def test_the_migrations_make_the_newest(tmp_path: Path) -> None:
    """A new database has exactly the schema of the newest file. Fails if a released migration is changed."""
    sql.migrate(tmp_path / "new.db")
    assert schema(tmp_path / "new.db") == SCHEMAS[-1].read_text(encoding="utf-8")


def test_each_table_that_refers_to_others_is_checked(tmp_path: Path) -> None:
    """`sql.REFERRING`, whose foreign keys each migration checks, names every table that has foreign keys."""
    sql.migrate(tmp_path / "new.db")
    query = "SELECT DISTINCT t.name FROM sqlite_master t, pragma_foreign_key_list(t.name) WHERE t.type = 'table'"
    with closing(sqlite3.connect(tmp_path / "new.db")) as conn:
        assert {row[0] for row in conn.execute(query)} == set(sql.REFERRING)


@pytest.mark.parametrize("version", SCHEMAS, ids=lambda path: path.stem)
def test_a_version_migrates_to_the_newest(tmp_path: Path, version: Path) -> None:
    """A migrated database has the same schema as a new one."""
    with closing(sqlite3.connect(tmp_path / "old.db")) as conn:
        conn.executescript(version.read_text(encoding="utf-8"))
    assert schema(tmp_path / "old.db") == version.read_text(encoding="utf-8")
    sql.migrate(tmp_path / "old.db")
    assert schema(tmp_path / "old.db") == SCHEMAS[-1].read_text(encoding="utf-8")


def test_the_schema_of_an_adopted_database_is_the_same(tmp_path: Path) -> None:
    """A migrated legacy database has the same schema as a new one, except for the columns of the orphaned_ tables."""
    with closing(sqlite3.connect(tmp_path / "old.db")) as conn:
        conn.executescript((Path(__file__).parent / "legacy_schema.sql").read_text(encoding="utf-8"))
    for name in ("old.db", "new.db"):
        sql.migrate(tmp_path / name)
    statements = [set(schema(tmp_path / name).split(";\n")) for name in ("old.db", "new.db")]
    old, new = ({line for line in lines if "orphaned" not in line} for lines in statements)
    assert old == new


def test_the_statuses_are_the_same_everywhere(tmp_path: Path) -> None:
    """The type `Status`, the table's CHECK, its trigger and the set of final statuses agree.

    The trigger allows queued → streaming, queued → stopped, and streaming → any final status, and refuses the rest.
    """
    statuses = set(get_args(sql.Status))
    assert statuses - {"queued", "streaming"} == replies.FINAL
    allowed = {("queued", "streaming"), ("queued", "stopped"), *(("streaming", final) for final in replies.FINAL)}
    sql.migrate(tmp_path / "new.db")
    with closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None)) as conn:
        insert = "INSERT INTO messages (session_id, role, content, status, created_at) VALUES (1, 'user', '', ?, '')"
        with pytest.raises(sqlite3.IntegrityError):
            conn.execute(insert, ("no such status",))
        for old, new in product(statuses, statuses):
            conn.execute("DELETE FROM messages")
            conn.execute(insert, (old,))
            if old == new or (old, new) in allowed:
                conn.execute("UPDATE messages SET status = ?", (new,))
            else:
                with pytest.raises(sqlite3.IntegrityError):
                    conn.execute("UPDATE messages SET status = ?", (new,))
