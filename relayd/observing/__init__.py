"""Reporting: the lines of the log, and metrics."""
