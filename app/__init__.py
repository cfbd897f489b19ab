"""The service: what a job is, who may change it, what the API says. Never imports `workers`."""
