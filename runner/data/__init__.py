"""Turns rows into token ids and labels. Imports no torch."""
