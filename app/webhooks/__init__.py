"""Events that leave the service: endpoints of a project, the outbox, and its delivery as Standard Webhooks."""
