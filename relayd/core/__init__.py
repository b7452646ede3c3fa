"""What a session is: record, stages, endings, errors, interfaces, settings; no I/O."""
