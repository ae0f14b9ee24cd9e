"""Recipes, graphs of stages, the plan of a run, the run, and the command."""
