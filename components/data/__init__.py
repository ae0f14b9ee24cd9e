"""Shards, sources and the ordered stream."""
