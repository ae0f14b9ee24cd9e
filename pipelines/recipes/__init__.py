"""Recipes: shapes, systems, and one Python function or row of a table for each recipe."""
