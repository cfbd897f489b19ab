"""Stored trajectories: the ledger of states, the traces, and reading both."""
