"""The training process. Nothing outside this package imports torch; nothing in it launches processes."""
