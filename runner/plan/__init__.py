"""The decision for each run, and its reason."""
