"""One file per task: its section of a recipe, its reading of rows, and its judging of answers."""
