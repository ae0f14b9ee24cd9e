"""Losses as free functions of tensors, without state."""
