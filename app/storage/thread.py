"""A blocking call of storage for async callers: in a thread, awaited for a bounded time.

Does not cover: the deadlines of single calls to an object store (`remote`). This one is for a disk that hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from app.storage.errors import StorageUnavailable

P = ParamSpec("P")
T = TypeVar("T")

HANGS_S = 900.0  # above what `remote` allows for the largest upload


async def in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Raises StorageUnavailable when it is late; the thread itself cannot be stopped."""
    try:
        async with asyncio.timeout(HANGS_S):
            return await asyncio.to_thread(work, *args, **kwargs)
    except TimeoutError:
        raise StorageUnavailable("its place", f"no answer within {HANGS_S:g} s") from None
