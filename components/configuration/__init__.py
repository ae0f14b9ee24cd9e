"""Everything that decides a result, as trees of plain values: no torch, nothing that runs."""
