"""Small models and texts, built offline."""
