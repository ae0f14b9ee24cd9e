"""Lecture and comparison: many recipes, one page."""
