"""The control socket: HTTP and JSON for whoever operates a running relayd."""
