"""A SQLite connection whose calls run to their end though their task is cancelled; then the cancellation goes on.

Does not cover: engines and transactions (`app.db.engine`).

A call in SQLite's thread cannot be taken back. Without this, a task that is cancelled in a transaction leaves the call
running while the connection is closed under it: the write lock stays until garbage collection, and a second cancel
ends the thread under the first one's close, which then waits for ever.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiosqlite

T = TypeVar("T")


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; a cancellation of the caller is raised only when `work` is done."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            cancelled = error
        except BaseException:
            break  # the work's own: raised below
    if cancelled is not None:
        task.exception()  # looked at, or asyncio complains that nobody did
        raise cancelled
    return task.result()


class PatientConnection(aiosqlite.Connection):
    """`_execute` carries every call into the thread, private since aiosqlite 0.1; tests/db/test_engine.py holds it."""

    async def _execute(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        return await to_its_end(super()._execute(fn, *args, **kwargs))  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Rolls back first: a statement that nobody read to its end keeps the transaction of a closed connection."""
        await to_its_end(self._close())

    async def _close(self) -> None:
        if self._connection is not None and self.in_transaction:
            await self.rollback()
        await super().close()
