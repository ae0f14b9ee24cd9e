"""From trained models to images."""
