"""Faults that were made on purpose, each with what must hold in spite of it."""
