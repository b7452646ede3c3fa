"""Which clients are admitted, how many, and how fast."""
