"""The command line for operators: `python database.py backup|restore|check|claim`."""

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
    check,
    exit_status,
    open_to_read,
    print_stderr,
    print_stdout,
    restore,
    suffixed,
)
from database import connect
from locks import FileLock, LockHeldError
from settings import Settings, load_settings

_EXIT_STATUSES = """exit status:
  0  done
  1  a check failed, or a file is damaged or not a database of this service
  2  wrong arguments or settings
  3  refused, because a service or another program uses the database
  4  a problem with a file: it already exists, does not exist, cannot be written, or the disk is full
"""


def _claim(settings: Settings, given: argparse.Namespace) -> None:
    """Runs `sql.claim_projects` in a transaction. Raises CommandError."""
    with open_to_read(settings.db_path) as conn:
        version = sql.schema_version(conn)
    if version != len(sql.MIGRATIONS):
        advice = f"This command needs version {len(sql.MIGRATIONS)}. Start the service once to migrate the database."
        raise CommandError(FILE_PROBLEM, f"{settings.db_path} has schema version {version}. {advice}")
    with ExitStack() as stack:
        stack.enter_context(stack.enter_context(closing(FileLock(suffixed(settings.db_path, ".lock")))))
        conn = stack.enter_context(closing(connect(settings.db_path, read_only=False)))
        conn.execute("BEGIN IMMEDIATE")
        try:
            count = sql.claim_projects(conn, given.from_user, given.to)
        except errors.Invalid as error:
            raise CommandError(2, error.message) from error
        conn.execute("COMMIT")
    print_stdout(f"{count} projects of user {given.from_user} now belong to {given.to}")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    about = "Backs up, restores and checks the database of clawd-backend, and claims projects of legacy accounts."
    parser = argparse.ArgumentParser("database.py", description=about, epilog=_EXIT_STATUSES, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[Settings, argparse.Namespace], None], does: str) -> Callable[..., object]:
        command = commands.add_parser(
            name, help=does, description=does, epilog=_EXIT_STATUSES, formatter_class=formatter
        )
        command.add_argument("--database", type=Path, metavar="PATH", help="use this database instead of DB_PATH")
        command.set_defaults(run=run)
        return command.add_argument

    add("backup", backup, "Copies the database to FILE. The service may be running.")("file", metavar="FILE", type=Path)
    add("restore", restore, "Replaces the database with the backup FILE. Stop the service first.")(
        "file", metavar="FILE", type=Path
    )
    add("check", check, "Checks the database, and that every image exists. The service may be running.")
    claim = add("claim", _claim, "Gives the projects of an account without e-mail or password to another account.")
    claim("--from-user", type=int, required=True, metavar="ID", help="id of the account without e-mail or password")
    claim("--to", required=True, metavar="EMAIL", help="e-mail of the account that gets the projects")
    return parser


_ADVICE = {
    DAMAGED: "The file is damaged or not a database. Restore a backup.",
    IN_USE: "Another program is using the database, such as a sqlite3 shell or a backup. End it and try again.",
    FILE_PROBLEM: "Check the disk space and the permissions, and try again.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command of `python database.py` and returns its exit status.

    `arguments` defaults to those of the process. Raises SystemExit for wrong arguments or settings.
    """
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
        print_stderr(str(error))
        return error.status
    except (sqlite3.Error, LockHeldError) as error:
        prefix = "SQLite error: " if isinstance(error, sqlite3.Error) else ""
        print_stderr(f"{prefix}{error}. {_ADVICE[exit_status(error)]}")
        return exit_status(error)
    except OSError as error:
        print_stderr(f"{error.filename or 'the disk'}: {error.strerror}. {_ADVICE[FILE_PROBLEM]}")
        return FILE_PROBLEM
    except errors.AppError as error:
        print_stderr(f"{error.message} {_ADVICE[FILE_PROBLEM]}")
        return FILE_PROBLEM
    except KeyboardInterrupt:
        print_stderr("Interrupted. Only the steps that are printed above were done.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
