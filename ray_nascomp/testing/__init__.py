"""Conformance suites, table-backed trainables and problems with known fronts, for users too."""
