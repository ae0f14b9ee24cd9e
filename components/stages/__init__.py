"""Stages of the workflow, a file for each: configuration and run function."""
