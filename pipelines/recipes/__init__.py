"""Recipes: shapes, systems, and a Python function or table row for each recipe."""
