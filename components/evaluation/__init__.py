"""Distances, grids and the report."""
