"""What a client says before it is relayed: pure parsers."""
