"""Parsers of what a client sends before it is relayed; no I/O."""
