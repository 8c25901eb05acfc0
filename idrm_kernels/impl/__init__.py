"""Implementations of the map distance: one module or folder each, all of the same mathematics (DESIGN section 2)."""
