"""Engines: each decides where and when attempts run; one file per engine."""
