"""All SQL on samplers, wants, loaded adapters and pins.

Does not cover: what to load or evict (`app.samplers.service`), nor starting samplers (`workers.sampler.keeper`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from app.core.states import JobStatus
from app.db.engine import now
from app.db.tables import DEFAULT_PROJECT, AdapterPin, Job, Sampler, SamplerAdapter, SamplerWant
from app.samplers.errors import SamplerGone

LIVE_WITHIN_S = 15.0  # a sampler whose keeper has not beaten for this long is not used


def _upsert(session: AsyncSession) -> Callable[..., Any]:
    """`INSERT … ON CONFLICT` of the dialect: of two processes that are first at once, neither fails."""
    return sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert


async def live(session: AsyncSession, base_model: str) -> Sequence[Sampler]:
    """Samplers of this base model with a fresh heartbeat, newest first."""
    query = (
        select(Sampler)
        .where(Sampler.base_model == base_model, Sampler.heartbeat > now() - LIVE_WITHIN_S)
        .order_by(Sampler.started_at.desc())
    )
    return (await session.scalars(query)).all()


async def register(session: AsyncSession, sampler: Sampler) -> None:
    session.add(sampler)
    await session.flush()


async def beat(session: AsyncSession, sampler_id: str) -> None:
    await session.execute(update(Sampler).where(Sampler.id == sampler_id).values(heartbeat=now()))


async def remove(session: AsyncSession, *, sampler_id: str | None = None, host: str | None = None) -> None:
    """Forget one sampler, or all of a host (its keeper starts anew); adapters and pins go with it."""
    condition = Sampler.id == sampler_id if sampler_id is not None else Sampler.host == host
    await session.execute(delete(Sampler).where(condition))


async def want(session: AsyncSession, base_model: str, seconds: float) -> None:
    """Ask the keeper to have a sampler for `base_model` at least until then; forgets an earlier start failure."""
    until = now() + seconds
    made = _upsert(session)(SamplerWant).values(base_model=base_model, project_id=DEFAULT_PROJECT, wanted_until=until)
    await session.execute(made.on_conflict_do_update(index_elements=["base_model"], set_={"wanted_until": until}))


async def wants(session: AsyncSession) -> Sequence[str]:
    return (await session.scalars(select(SamplerWant.base_model).where(SamplerWant.wanted_until > now()))).all()


async def set_want_error(session: AsyncSession, base_model: str, error: str | None) -> None:
    await session.execute(update(SamplerWant).where(SamplerWant.base_model == base_model).values(error=error))


async def want_error(session: AsyncSession, base_model: str) -> str | None:
    """Why the keeper could not start a sampler, if that is what happened last."""
    return await session.scalar(select(SamplerWant.error).where(SamplerWant.base_model == base_model))


async def loaded(session: AsyncSession, sampler_id: str, name: str) -> SamplerAdapter | None:
    return await session.get(SamplerAdapter, (sampler_id, name))


async def own(session: AsyncSession, sampler_id: str) -> None:
    """Until the end of the transaction nobody else changes what this sampler holds, nor takes the sampler away.

    A keeper may have done so already; raises `SamplerGone` instead of breaking a foreign key.
    """
    held = select(Sampler.id).where(Sampler.id == sampler_id).with_for_update(key_share=True)
    if await session.scalar(held) is None:
        raise SamplerGone(sampler_id)


async def add_adapter(session: AsyncSession, sampler_id: str, name: str, path: str) -> None:
    """Note a loaded adapter; once more is fine. Raises `SamplerGone`."""
    await own(session, sampler_id)
    made = _upsert(session)(SamplerAdapter).values(
        sampler_id=sampler_id, name=name, path=path, project_id=DEFAULT_PROJECT, loaded_at=now(), last_used=now()
    )
    await session.execute(made.on_conflict_do_nothing())


async def drop_adapter(session: AsyncSession, sampler_id: str, name: str) -> None:
    await session.execute(
        delete(SamplerAdapter).where(SamplerAdapter.sampler_id == sampler_id, SamplerAdapter.name == name)
    )
    await session.execute(delete(AdapterPin).where(AdapterPin.sampler_id == sampler_id, AdapterPin.name == name))


async def pin(session: AsyncSession, sampler_id: str, name: str, holder: str, seconds: float) -> None:
    """Hold an adapter for `seconds`; again by the same holder extends the pin. Marks it used. Raises `SamplerGone`."""
    await own(session, sampler_id)
    until = now() + seconds
    made = _upsert(session)(AdapterPin).values(
        sampler_id=sampler_id, name=name, holder=holder, project_id=DEFAULT_PROJECT, pinned_until=until
    )
    await session.execute(
        made.on_conflict_do_update(index_elements=["sampler_id", "name", "holder"], set_={"pinned_until": until})
    )
    await session.execute(
        update(SamplerAdapter)
        .where(SamplerAdapter.sampler_id == sampler_id, SamplerAdapter.name == name)
        .values(last_used=now())
    )


async def unpin(session: AsyncSession, name: str, holder: str, *, sampler_id: str | None = None) -> None:
    """Let an adapter go on one sampler, or on all."""
    pins = delete(AdapterPin).where(AdapterPin.name == name, AdapterPin.holder == holder)
    await session.execute(pins if sampler_id is None else pins.where(AdapterPin.sampler_id == sampler_id))


async def pinned(session: AsyncSession, sampler_id: str, name: str) -> bool:
    """Is anybody using this adapter right now?"""
    query = select(func.count()).where(
        AdapterPin.sampler_id == sampler_id, AdapterPin.name == name, AdapterPin.pinned_until > now()
    )
    return bool(await session.scalar(query))


async def evictable(session: AsyncSession, sampler_id: str) -> Sequence[SamplerAdapter]:
    """Loaded adapters without a live pin, least recently used first."""
    live_pins = select(AdapterPin.name).where(AdapterPin.sampler_id == sampler_id, AdapterPin.pinned_until > now())
    query = (
        select(SamplerAdapter)
        .where(SamplerAdapter.sampler_id == sampler_id, SamplerAdapter.name.not_in(live_pins))
        .order_by(SamplerAdapter.last_used)
    )
    return (await session.scalars(query)).all()


async def adapter_count(session: AsyncSession, sampler_id: str) -> int:
    return await session.scalar(select(func.count()).where(SamplerAdapter.sampler_id == sampler_id)) or 0


async def reserved_but_unused(session: AsyncSession, sampler_id: str, base_model: str) -> int:
    """Slots that running jobs reserved and do not fill yet: chat must leave them free."""
    reserved = await session.scalar(
        select(func.coalesce(func.sum(Job.reserved_slots), 0)).where(
            Job.status == JobStatus.RUNNING, Job.model == base_model
        )
    )
    used = await session.scalar(
        select(func.count(func.distinct(AdapterPin.name))).where(
            AdapterPin.sampler_id == sampler_id, AdapterPin.holder.like("ftjob-%"), AdapterPin.pinned_until > now()
        )
    )
    return max(0, (reserved or 0) - (used or 0))
