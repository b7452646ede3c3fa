"""Which clients are admitted, and how many."""
