"""One stream session, from accept to end."""
