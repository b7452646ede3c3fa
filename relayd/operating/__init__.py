"""From text to settings to a running service."""
