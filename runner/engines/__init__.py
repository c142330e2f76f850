"""Where and when attempts run: one file per engine."""
