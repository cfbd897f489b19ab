"""Checkpoints of a job over HTTP. Does not cover: their files."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

from app.core.settings import Settings
from app.db.engine import Database
from tests.api.live_server import LiveServer
from tests.db.rows import Seed


@pytest.fixture
def seed(database: Database, settings: Settings) -> Seed:
    return Seed(database, settings)


async def test_checkpoints_are_newest_first_and_paged(client: OpenAI, seed: Seed) -> None:
    job_id = await seed.job()
    made = [await seed.checkpoint(job_id, step, train_mean_reward=0.1 * step) for step in (1, 2, 3)]
    assert [found.id for found in client.fine_tuning.jobs.checkpoints.list(job_id, limit=1)] == made[::-1]
    page = client.fine_tuning.jobs.checkpoints.list(job_id)
    assert (page.first_id, page.last_id, page.has_more) == (made[2], made[0], False)  # type: ignore[attr-defined]
    newest = page.data[0]
    assert newest.step_number == 3
    assert newest.fine_tuning_job_id == job_id
    assert newest.fine_tuned_model_checkpoint.endswith(":ckpt-step-3")
    assert newest.metrics.to_dict() == {"step": 3, "train_mean_reward": pytest.approx(0.3)}


async def test_an_unknown_cursor_is_a_400(client: OpenAI, seed: Seed) -> None:
    job_id, other = await seed.job(), await seed.job()
    foreign = await seed.checkpoint(other, 1)
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.checkpoints.list(job_id, after=foreign)
    assert caught.value.param == "after"


async def test_a_strict_client_can_parse_them(live_server: LiveServer, seed: Seed) -> None:
    job_id = await seed.job()
    await seed.checkpoint(job_id, 1)
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, _strict_response_validation=True) as strict:
        assert len(list(strict.fine_tuning.jobs.checkpoints.list(job_id))) == 1
