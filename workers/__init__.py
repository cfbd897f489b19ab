"""Execution: how a job is run. Imports `app`; is never imported by it."""
