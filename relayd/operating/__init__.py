"""From settings to a running service, and how it runs: signals, logs."""
