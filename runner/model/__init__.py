"""Weights: loading, exporting, their size and the memory they need."""
