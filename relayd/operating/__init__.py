"""Settings, the service that they describe, and how it runs: signals, log file."""
