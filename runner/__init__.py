"""A YAML-recipe-driven runner of supervised fine-tuning experiments."""

__version__ = "0.1.0"
