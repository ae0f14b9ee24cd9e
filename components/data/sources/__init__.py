"""One source of pictures a file."""
