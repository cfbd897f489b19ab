"""Jobs over HTTP once they exist: retrieve, list, filter, page, cancel, events. Rows of a worker come from the test."""

from __future__ import annotations

import httpx
import openai
import pytest
from openai import OpenAI

from app.core.settings import Settings
from app.core.states import RolloutState
from app.db.engine import Database
from app.db.tables import DEFAULT_PROJECT
from app.jobs import events
from app.jobs.plan import resolve
from app.models.catalogue import Catalogue
from tests.api.jobs_fixture import install_model
from tests.api.live_server import LiveServer
from tests.db.rows import METHOD, Seed


@pytest.fixture
def seed(database: Database, settings: Settings) -> Seed:
    return Seed(database, settings)


def test_an_unknown_job_is_the_recorded_404(client: OpenAI) -> None:
    for call in (
        client.fine_tuning.jobs.retrieve,
        client.fine_tuning.jobs.cancel,
        client.fine_tuning.jobs.list_events,
        client.fine_tuning.jobs.checkpoints.list,
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            call("ftjob-none")
        assert (caught.value.code, caught.value.param) == ("fine_tune_not_found", "fine_tune_id")
        assert "Could not find fine tune: ftjob-none" in caught.value.message


async def test_another_project_gets_the_same_404(live_server: LiveServer, other_key: str, seed: Seed) -> None:
    job_id = await seed.job()
    with OpenAI(base_url=live_server.base_url, api_key=other_key) as stranger:
        with pytest.raises(openai.NotFoundError):
            stranger.fine_tuning.jobs.retrieve(job_id)
        with pytest.raises(openai.NotFoundError):
            stranger.fine_tuning.jobs.cancel(job_id)
        assert list(stranger.fine_tuning.jobs.list()) == []


async def test_the_client_pages_through_every_job_once(client: OpenAI, seed: Seed) -> None:
    made = [await seed.job() for _ in range(4)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=1)] == made[::-1]
    assert client.fine_tuning.jobs.list(limit=4).has_more is False
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.list(after="ftjob-none")
    assert caught.value.param == "after"


def test_a_limit_out_of_range_is_a_400(http: httpx.Client) -> None:
    for limit in ("0", "1001", "x"):
        answer = http.get(f"/v1/fine_tuning/jobs?limit={limit}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit"), limit


async def test_the_client_filters_by_metadata(client: OpenAI, http: httpx.Client, seed: Seed) -> None:
    red = await seed.job(user_metadata={"colour": "red", "empty": ""})
    bare = await seed.job()
    jobs = client.fine_tuning.jobs
    assert [job.id for job in jobs.list(metadata={"colour": "red"})] == [red]
    assert [job.id for job in jobs.list(metadata={"empty": ""})] == [red]
    assert [job.id for job in jobs.list(metadata={"colour": "blue"})] == []
    assert [job["id"] for job in http.get("/v1/fine_tuning/jobs?metadata=null").json()["data"]] == [bare]
    assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [bare]
    assert http.get("/v1/fine_tuning/jobs?metadata=red").status_code == 400


async def test_a_running_job_shows_numbers_activity_and_its_ledger(
    client: OpenAI, seed: Seed, settings: Settings
) -> None:
    install_model(settings)
    plan = resolve(METHOD, {}, 16, 4, Catalogue(settings.models_dir).get("tiny"), 7)
    job_id = await seed.job(
        status="running",
        plan=plan.as_dict(),
        started_at=1.0,
        step=1,
        total_steps=plan.total_steps,
        attempt=2,
        activity="sampling step 2",
        activity_at=1.0,
        seconds={"sampling": 3.5},
    )
    for state in (RolloutState.TRAINED, RolloutState.TRAINED, RolloutState.STARTED):
        await seed.rollout(job_id, state)
    job = client.fine_tuning.jobs.retrieve(job_id).to_dict()
    assert job["method"]["reinforcement"]["hyperparameters"]["batch_size"] == plan.batch_size
    assert job["estimated_finish"] > 1
    hone = job["hone"]
    assert hone["rollouts"] == {"started": 3, "states": {"started": 1, "trained": 2}}
    assert hone["activity"]["text"] == "sampling step 2"
    assert hone["activity"]["age_s"] > 1
    assert (hone["attempt"], hone["step"], hone["seconds"]) == (2, 1, {"sampling": 3.5})
    assert hone["plan"] == plan.as_dict()


async def test_a_job_that_never_ran_still_says_auto(client: OpenAI, seed: Seed, settings: Settings) -> None:
    install_model(settings)
    plan = resolve(METHOD, {}, 16, 4, Catalogue(settings.models_dir).get("tiny"), 7).as_dict()
    waiting = await seed.job(status="queued", plan=plan, queue_reason="waits for adapter slots")
    again = await seed.job(status="queued", plan=plan, started_at=1.0)
    cancelled = await seed.job(status="cancelled", plan=plan, finished_at=1.0)
    for job_id in (waiting, again, cancelled):
        job = client.fine_tuning.jobs.retrieve(job_id).to_dict()
        assert job["method"]["reinforcement"]["hyperparameters"]["batch_size"] == "auto"
    assert client.fine_tuning.jobs.retrieve(waiting).to_dict()["hone"]["queue_reason"] == "waits for adapter slots"


async def test_a_strict_client_parses_every_status(live_server: LiveServer, seed: Seed) -> None:
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, _strict_response_validation=True) as strict:
        for status in ("validating_files", "queued", "running", "succeeded", "failed", "cancelled"):
            ended = 9 if status in ("succeeded", "failed", "cancelled") else None
            error = {"code": "a", "message": "b", "param": None} if status == "failed" else None
            job_id = await seed.job(status=status, finished_at=ended, error=error, trained_tokens=5)
            job = strict.fine_tuning.jobs.retrieve(job_id)
            assert (job.status, job.finished_at) == (status, ended)
            assert job.trained_tokens == (5 if ended else None)


async def test_cancel_answers_the_job_and_a_second_cancel_is_refused_once(live_server: LiveServer, seed: Seed) -> None:
    job_id = await seed.job(status="queued")
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key) as retrying:
        job = retrying.fine_tuning.jobs.cancel(job_id)
        assert job.status == "cancelled"
        assert job.finished_at is not None
        with pytest.raises(openai.BadRequestError) as caught:
            retrying.fine_tuning.jobs.cancel(job_id)
    assert f'Cannot cancel a job {job_id} that already has status "cancelled".' in caught.value.message
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key) as again:
        assert again.fine_tuning.jobs.list_events(job_id).data[0].message == "Fine-tuning job cancelled"


async def test_events_are_newest_first_and_carry_their_data(
    client: OpenAI, http: httpx.Client, seed: Seed, database: Database
) -> None:
    job_id = await seed.job()
    async with database.begin() as session:
        for step in range(3):
            await events.append(
                session,
                project_id=DEFAULT_PROJECT,
                job_id=job_id,
                message=f"Step {step}/3",
                type="metrics",
                data={"step": step, "train_mean_reward": 0.5},
            )
    found = list(client.fine_tuning.jobs.list_events(job_id, limit=1))
    assert [event.data["step"] for event in found if isinstance(event.data, dict)] == [2, 1, 0]
    assert {event.type for event in found} == {"metrics"}
    first = http.get(f"/v1/fine_tuning/jobs/{job_id}/events?order=asc&limit=1").json()
    assert first["data"][0]["data"]["step"] == 0
    assert first["has_more"] is True
    rest = http.get(f"/v1/fine_tuning/jobs/{job_id}/events?order=asc&after={first['last_id']}").json()
    assert [event["data"]["step"] for event in rest["data"]] == [1, 2]


async def test_a_metric_that_is_no_number_does_not_break_the_list(
    http: httpx.Client, seed: Seed, database: Database
) -> None:
    job_id = await seed.job(seconds={"sampling": float("nan")})
    async with database.begin() as session:
        await events.append(
            session, project_id=DEFAULT_PROJECT, job_id=job_id, message="Step 1/1", data={"kl": float("nan")}
        )
    answer = http.get(f"/v1/fine_tuning/jobs/{job_id}/events")
    assert answer.status_code == 200
    assert answer.json()["data"][0]["data"] == {"kl": None}
    assert http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["hone"]["seconds"] == {"sampling": None}
