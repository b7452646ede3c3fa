"""UDP: the modules of `relayd/datagrams`."""
