"""One file for each kind of generator; `kinds.py` is the table of them."""
