"""The loop (when) and the tasks (how)."""
