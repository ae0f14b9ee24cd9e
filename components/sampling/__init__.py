"""From trained models to pictures."""
