"""The tables `users` and `revoked_tokens`."""

import time
import unicodedata
from sqlite3 import Connection
from typing import NamedTuple

import errors
from clock import now


def email_key(email: str | None) -> str | None:
    """Returns an e-mail address normalized for comparison: Unicode NFC, then case-folded."""
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
    """Creates an account. Raises errors.Conflict if the e-mail already has one. `password` is a hash."""
    row = conn.execute(
        "INSERT INTO users (email, email_key, name, password, created_at) VALUES (?, ?, ?, ?, ?) "
        f"ON CONFLICT (email_key) DO NOTHING RETURNING {_USER}",
        (email, email_key(email), name, password, now()),
    ).fetchone()
    if row is None:
        raise errors.Conflict("An account with this e-mail already exists. Log in instead.", code="email_taken")
    return User(*row)


def select_user_by_email(conn: Connection, email: str) -> User | None:
    """Returns the account of an e-mail address, ignoring case.

    Two legacy accounts may differ only in case; the one with the exact spelling takes precedence.
    """
    row = conn.execute(
        f"SELECT {_USER} FROM users WHERE email_key IN (:key, :exact) ORDER BY email = :exact DESC LIMIT 1",
        {"key": email_key(email), "exact": email},
    ).fetchone()
    return row and User(*row)


def select_user_by_token(conn: Connection, user_id: int, token_version: int, jti: str) -> User | None:
    """Returns the account of an access token.

    None if the account no longer exists, the token `jti` was revoked, or the password was changed since.
    """
    row = conn.execute(
        f"SELECT {_USER} FROM users WHERE id = ? AND token_version = ? "
        "AND NOT EXISTS (SELECT 1 FROM revoked_tokens WHERE jti = ?)",
        (user_id, token_version, jti),
    ).fetchone()
    return row and User(*row)


def update_password_hash(conn: Connection, user_id: int, old: str, new: str) -> None:
    """Replaces the hash of an unchanged password. Tokens stay valid.

    Does nothing if the stored hash is no longer `old`, which means that the password was changed concurrently.
    """
    conn.execute("UPDATE users SET password = ? WHERE id = ? AND password = ?", (new, user_id, old))


def update_password(conn: Connection, user_id: int, password: str) -> User | None:
    """Sets a new password hash, revokes all earlier tokens, and returns the account, or None if there is none."""
    row = conn.execute(
        f"UPDATE users SET password = ?, token_version = token_version + 1 WHERE id = ? RETURNING {_USER}",
        (password, user_id),
    ).fetchone()
    return row and User(*row)


def insert_revoked_token(conn: Connection, jti: str, expires_at: int) -> None:
    """Revokes a token until it expires (Unix seconds), and deletes the entries of tokens that have expired."""
    conn.execute("DELETE FROM revoked_tokens WHERE expires_at < ?", (int(time.time()),))
    conn.execute("INSERT OR IGNORE INTO revoked_tokens (jti, expires_at) VALUES (?, ?)", (jti, expires_at))


def select_unclaimed(conn: Connection) -> list[tuple[int, int]]:
    """Returns (user id, number of projects) for each account without e-mail or password that owns projects."""
    return conn.execute(
        f"SELECT u.id, count(*) FROM users u JOIN projects p ON p.user_id = u.id WHERE {_CANNOT_LOG_IN} GROUP BY u.id"
    ).fetchall()


_CANNOT_LOG_IN = "(coalesce(u.email, '') = '' OR coalesce(u.password, '') = '')"


def claim_projects(conn: Connection, user_id: int, email: str) -> int:
    """Gives the projects of an account without e-mail or password to the account of `email`; returns their number.

    Raises errors.Invalid if either account does not exist, if the first one can log in, or the second one cannot.
    """
    row = conn.execute(f"SELECT {_CANNOT_LOG_IN} FROM users u WHERE u.id = ?", (user_id,)).fetchone()
    new_owner = select_user_by_email(conn, email)
    if row is None:
        raise errors.Invalid(f"There is no user {user_id}.")
    if new_owner is None:
        raise errors.Invalid(f"There is no account with the e-mail {email}. Sign up first.")
    if not row[0]:
        raise errors.Invalid(f"User {user_id} can log in, so the projects of this account cannot be claimed.")
    if new_owner.id == user_id:
        raise errors.Invalid(f"User {user_id} is the account with the e-mail {email}. Name another account.")
    if not new_owner.password:
        raise errors.Invalid(f"Nobody can log in as {email}, because this account has no password.")
    return conn.execute("UPDATE projects SET user_id = ? WHERE user_id = ?", (new_owner.id, user_id)).rowcount
