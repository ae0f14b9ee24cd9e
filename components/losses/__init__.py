"""Losses as free functions."""
