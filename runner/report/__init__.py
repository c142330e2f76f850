"""Compares runs and reports what they show."""
