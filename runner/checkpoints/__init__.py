"""One subject for both processes: what makes a checkpoint count, which one is used, and where its
files go.
"""
