"""The `relayctl` command: checks, shows and documents configuration files."""
