"""Accounts."""

import time
import unicodedata
from sqlite3 import Connection
from typing import NamedTuple

import errors
from clock import now


def email_key(email: str | None) -> str | None:
    """What two spellings of one e-mail have in common."""
    return email and unicodedata.normalize("NFC", email).casefold()


class User(NamedTuple):
    id: int
    email: str | None
    name: str | None
    created_at: str
    password: str | None
    token_version: int


_USER = "id, email, name, created_at, password, token_version"


def insert_user(conn: Connection, email: str, name: str | None, password: str) -> User:
    """A new account. Raises errors.Conflict where the e-mail has one."""
    row = conn.execute(
        "INSERT INTO users (email, email_key, name, password, created_at) VALUES (?, ?, ?, ?, ?) "
        f"ON CONFLICT (email_key) DO NOTHING RETURNING {_USER}",
        (email, email_key(email), name, password, now()),
    ).fetchone()
    if row is None:
        raise errors.Conflict("There is an account with this e-mail already: log in instead.", code="email_taken")
    return User(*row)


def select_user_by_email(conn: Connection, email: str) -> User | None:
    """The account of an e-mail, whatever its case; its exact spelling wins where two differ by case alone."""
    row = conn.execute(
        f"SELECT {_USER} FROM users WHERE email_key IN (:key, :exact) ORDER BY email = :exact DESC LIMIT 1",
        {"key": email_key(email), "exact": email},
    ).fetchone()
    return row and User(*row)


def select_user_by_token(conn: Connection, user_id: int, token_version: int, jti: str) -> User | None:
    """The account that a token speaks for, unless the token or all of its age were revoked."""
    row = conn.execute(
        f"SELECT {_USER} FROM users WHERE id = ? AND token_version = ? "
        "AND NOT EXISTS (SELECT 1 FROM revoked_tokens WHERE jti = ?)",
        (user_id, token_version, jti),
    ).fetchone()
    return row and User(*row)


def update_password_hash(conn: Connection, user_id: int, old: str, new: str) -> None:
    """A better hash of the same password; tokens stay valid. Nothing, where the password changed meanwhile."""
    conn.execute("UPDATE users SET password = ? WHERE id = ? AND password = ?", (new, user_id, old))


def update_password(conn: Connection, user_id: int, password: str) -> User | None:
    """A new password; every token made before is refused from now on."""
    row = conn.execute(
        f"UPDATE users SET password = ?, token_version = token_version + 1 WHERE id = ? RETURNING {_USER}",
        (password, user_id),
    ).fetchone()
    return row and User(*row)


def insert_revoked_token(conn: Connection, jti: str, expires_at: int) -> None:
    """Refuses a token until it would have expired (unix seconds); forgets those that have."""
    conn.execute("DELETE FROM revoked_tokens WHERE expires_at < ?", (int(time.time()),))
    conn.execute("INSERT OR IGNORE INTO revoked_tokens (jti, expires_at) VALUES (?, ?)", (jti, expires_at))


def select_unclaimed(conn: Connection) -> list[tuple[int, int]]:
    """The accounts that nobody can sign into and that own projects: (user, how many)."""
    return conn.execute(
        f"SELECT u.id, count(*) FROM users u JOIN projects p ON p.user_id = u.id WHERE {_CLOSED} GROUP BY u.id"
    ).fetchall()


_CLOSED = "(coalesce(u.email, '') = '' OR coalesce(u.password, '') = '')"


def claim_projects(conn: Connection, user_id: int, email: str) -> int:
    """Gives the projects of an account that nobody can sign into to the account of an e-mail; how many.

    Raises errors.Invalid where there is no such account, somebody can sign into it, or nobody into the heir's.
    """
    row = conn.execute(f"SELECT {_CLOSED} FROM users u WHERE u.id = ?", (user_id,)).fetchone()
    heir = select_user_by_email(conn, email)
    if row is None or heir is None:
        missing = f"a user {user_id}" if row is None else f"an account with the e-mail {email}: sign up first"
        raise errors.Invalid(f"There is not {missing}.")
    if not row[0] or heir.id == user_id:
        raise errors.Invalid(f"Somebody can sign in as user {user_id}: what is theirs cannot be claimed.")
    if not heir.password:
        raise errors.Invalid(f"Nobody can sign in as {email} either: it has no password.")
    return conn.execute("UPDATE projects SET user_id = ? WHERE user_id = ?", (heir.id, user_id)).rowcount
