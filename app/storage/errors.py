"""What can be wrong with storage. A URL in a message is free of credentials.

Does not cover: what a client or a job is told about it (each room that stores something decides).

    StorageError
    ├── StorageUnavailable   it does not answer, refuses, or is full; the same may work later
    ├── ObjectMissing        there is nothing under this key
    └── ObjectDamaged        the bytes are not those whose digest was recorded
"""

from __future__ import annotations


class StorageError(Exception):
    """Base."""


class StorageUnavailable(StorageError):
    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"storage at {url}: {reason}")
        self.url = url
        self.reason = reason


class ObjectMissing(StorageError):
    def __init__(self, url: str, key: str) -> None:
        super().__init__(f"{url}/{key} does not exist")
        self.key = key


class ObjectDamaged(StorageError):
    def __init__(self, url: str, key: str, expected: str, found: str) -> None:
        super().__init__(f"{url}/{key} has the sha256 {found}, recorded is {expected}")
        self.key = key
