"""The definition of one run."""
