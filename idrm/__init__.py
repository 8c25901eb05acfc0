"""Interaction distillation: reward models that learn to read as a bidirectional encoder does (arXiv 2508.02618)."""
