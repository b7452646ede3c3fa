"""Sockets, files that are read, names, clocks and TLS."""
