"""The production topology as plain processes on one machine: `python -m deploy.local up`.

Does not cover: containers (`docker-compose.yml`) and several machines (docs/operations.md).
"""
