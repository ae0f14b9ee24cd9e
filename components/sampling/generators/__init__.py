"""Kinds of generators, a file each; `GENERATORS` in sampling/cascade.py is the table."""
