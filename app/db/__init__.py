"""Engine, base types and every table. Nothing outside a `repository`, `leases` or `events` module builds SQL."""
