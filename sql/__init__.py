"""Every SQL statement, as a function of a connection. Callers write `sql.begin_turn(conn, ...)`."""

from .adoption import LEGACY, AdoptionContext, KeptImage
from .schema import MAX_ID, MIGRATIONS, REFERRING, migrate
from .users import email_key

__all__ = [
    "LEGACY",
    "MAX_ID",
    "MIGRATIONS",
    "REFERRING",
    "AdoptionContext",
    "KeptImage",
    "email_key",
    "migrate",
]
