"""Configuration of every result, in trees of plain values: no torch, nothing that runs."""
