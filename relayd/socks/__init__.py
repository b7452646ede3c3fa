"""What a SOCKS proxy decides: destinations, ident, BIND."""
