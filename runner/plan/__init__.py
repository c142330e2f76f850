"""What happens to each run, and why."""
