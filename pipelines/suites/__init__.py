"""Lecture and comparison: many recipes on a page."""
