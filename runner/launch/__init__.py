"""One attempt: its placement, its command, and its process."""
