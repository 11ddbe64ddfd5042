"""Conformance suites and table-backed trainables, for users too."""
