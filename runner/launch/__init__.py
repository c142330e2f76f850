"""One attempt: where it runs, its command, and its process."""
