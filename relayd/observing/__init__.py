"""What is reported: the log's lines."""
