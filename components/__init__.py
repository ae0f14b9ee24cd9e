"""How each step is done; usable without any pipeline."""
