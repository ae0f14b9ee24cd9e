"""A registered model served over HTTP: API, batching, page."""
