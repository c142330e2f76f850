"""One file per task: its section of a recipe, how it reads rows, and how it judges answers."""
