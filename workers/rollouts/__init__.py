"""One coroutine per trajectory, groups of them, their ledger and traces. No torch, no web."""
