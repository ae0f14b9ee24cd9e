"""Artifacts on object storage."""
