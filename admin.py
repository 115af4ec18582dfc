"""The operator's command line: `python database.py backup|restore|check|claim`."""

import argparse
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import errors
import sql
from backup import (
    DAMAGED,
    FILE_PROBLEM,
    IN_USE,
    CommandError,
    backup,
    beside,
    check,
    exit_status,
    reading,
    restore,
    say,
    tell,
)
from database import FileLock, connect
from settings import Settings, load_settings

_EXIT_STATUSES = """exit status:
  0  done
  1  a check failed, or a file is damaged or no database of this service
  2  wrong arguments or settings
  3  refused, because a service or another program uses the database
  4  a problem with a file: it exists already, is not there, cannot be written, the disk is full
"""


def _claim(settings: Settings, given: argparse.Namespace) -> None:
    """Gives the projects of an account that nobody can sign into to somebody."""
    with reading(settings.db_path) as conn:
        version = sql.schema_version(conn)
    if version != len(sql.MIGRATIONS):
        start = "Start the service of this code once: it brings the database up to date."
        raise CommandError(FILE_PROBLEM, f"{settings.db_path} has schema version {version}. {start}")
    with ExitStack() as stack:
        stack.enter_context(stack.enter_context(closing(FileLock(beside(settings.db_path, ".lock")))))
        conn = stack.enter_context(closing(connect(settings.db_path, read_only=False)))
        conn.execute("BEGIN IMMEDIATE")
        try:
            count = sql.claim_projects(conn, given.from_user, given.to)
        except errors.Invalid as error:
            raise CommandError(2, error.message) from error
        conn.execute("COMMIT")
    say(f"{count} projects of user {given.from_user} belong to {given.to} now")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    about = "Backs up, restores and checks the database of clawd-backend, and claims what nobody can sign in for."
    parser = argparse.ArgumentParser("database.py", description=about, epilog=_EXIT_STATUSES, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[Settings, argparse.Namespace], None], does: str) -> Callable[..., object]:
        command = commands.add_parser(
            name, help=does, description=does, epilog=_EXIT_STATUSES, formatter_class=formatter
        )
        command.add_argument("--database", type=Path, metavar="PATH", help="the database, in place of DB_PATH")
        command.set_defaults(run=run)
        return command.add_argument

    add("backup", backup, "Copies the database to FILE, while the service runs or not.")(
        "file", metavar="FILE", type=Path
    )
    add("restore", restore, "Puts FILE in the database's place; the service must have ended.")(
        "file", metavar="FILE", type=Path
    )
    add("check", check, "Checks the database, while the service runs or not.")
    claim = add("claim", _claim, "Gives the projects of an account without e-mail or password to another account.")
    claim("--from-user", type=int, required=True, metavar="ID", help="the account that nobody can sign into")
    claim("--to", required=True, metavar="EMAIL", help="the account that gets them")
    return parser


_ADVICE = {
    DAMAGED: "The database is damaged, or none: restore a backup.",
    IN_USE: "Another program uses the database, such as a sqlite3 shell or a backup: end it and try again.",
    FILE_PROBLEM: "Look at the disk and at who may write there, and try again.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command of `python database.py`; returns its exit status. Raises SystemExit for wrong arguments."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        settings = load_settings()
    except SystemExit as wrong:
        parser.error(str(wrong))
    if given.database:
        settings = settings.model_copy(update={"db_path": given.database.resolve()})
    try:
        given.run(settings, given)
    except CommandError as error:
        tell(str(error))
        return error.status
    except sqlite3.Error as error:
        tell(f"SQLite says: {error}. {_ADVICE[exit_status(error)]}")
        return exit_status(error)
    except OSError as error:
        tell(f"{error.filename or 'the disk'}: {error.strerror}. {_ADVICE[FILE_PROBLEM]}")
        return FILE_PROBLEM
    except errors.AppError as error:
        tell(f"{error.message} {_ADVICE[FILE_PROBLEM]}")
        return FILE_PROBLEM
    except KeyboardInterrupt:
        tell("Interrupted: nothing is done but what is said above.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
