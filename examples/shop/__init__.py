"""The shop agent: a small model learns to look a price up instead of inventing it."""
