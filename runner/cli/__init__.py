"""The verbs of the command line, error printing, and exit codes."""
