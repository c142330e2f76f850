"""Checkpoints, for the launch side and the training process: which ones count, which one is used,
and where their files are stored.
"""
