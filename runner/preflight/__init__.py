"""Checks a whole grid before any device time is spent."""
