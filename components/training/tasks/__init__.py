"""One task for each trained model."""
