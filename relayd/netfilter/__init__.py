"""What the kernel must do for transparent relays: nftables rules, and routes."""
