"""Which samplers are alive, what they have loaded, who uses it, and the client of their protocol."""
