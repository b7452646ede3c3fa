"""Reporting: the lines of the log."""
