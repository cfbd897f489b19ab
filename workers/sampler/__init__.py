"""Samplers: the keeper that runs them on a host, the policy a run samples from, the built-in engine."""
