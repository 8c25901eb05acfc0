"""Evaluation on held-out pairs and benchmarks: what a model scores, and whether two models differ."""
