"""Settings, errors, ids, clock, logging, paging: what every room may use and what uses no other room."""
