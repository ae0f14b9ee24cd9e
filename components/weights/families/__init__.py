"""Foreign layouts, a file for each network of ours: marks, configuration, names in ours."""
