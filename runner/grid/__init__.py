"""Renders axes and templates into recipes."""
