"""Benchmarks: they print tables of docs/reliability.md, and check nothing."""
