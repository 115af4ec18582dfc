"""Accounts."""

import unicodedata


def email_key(email: str | None) -> str | None:
    """What two spellings of one e-mail have in common."""
    return email and unicodedata.normalize("NFC", email).casefold()
