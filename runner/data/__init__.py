"""Rows become token ids and labels. Imports no torch."""
