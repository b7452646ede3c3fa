"""From text to checked settings: addresses, options, files; no reactor."""
