"""The only door to MLflow."""
