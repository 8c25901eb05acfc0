"""Oracles and cases that tests and benchmarks share."""
