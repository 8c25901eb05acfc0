"""Time and memory of the interaction loss beside the naive one: `pytest benchmarks`, and the report of its runs."""
