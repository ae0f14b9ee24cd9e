"""One Python function a recipe."""
