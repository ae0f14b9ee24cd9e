"""Kinds of generators, a file each; `kinds.py` is the table."""
