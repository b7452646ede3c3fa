"""Sockets, names, clocks and TLS."""
