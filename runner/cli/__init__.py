"""The verbs of the command line, how errors are printed, and exit codes."""
