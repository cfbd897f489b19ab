"""The pairs agent: two items in one question, so two tool calls belong in one message."""
