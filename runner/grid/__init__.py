"""Axes and templates become recipes."""
