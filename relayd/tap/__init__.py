"""Command lines for `twistd` and `twist`: options and wiring, no behaviour."""
