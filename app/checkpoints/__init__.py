"""Public checkpoints: names, atomic publication with digests, listing, resolution to an adapter directory."""
