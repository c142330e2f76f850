"""Views of runs: the live screen and logs."""
