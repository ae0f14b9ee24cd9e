"""Foreign layouts by kind of network of ours: marks, configuration, names in ours."""
