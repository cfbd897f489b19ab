"""POST /v1/fine_tuning/jobs with the official client: accepted shapes, refusals, retries. Does not cover: running."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob, ReinforcementMethod

from app.core.settings import Settings
from app.db.engine import Database
from app.db.tables import Job
from tests.api.jobs_fixture import TOOL, Files, install_model, upload
from tests.api.live_server import LiveServer
from tests.db.rows import GRADER


@pytest.fixture
def files(client: OpenAI, settings: Settings) -> Files:
    install_model(settings)
    return upload(client)


def create(client: OpenAI, body: dict[str, Any]) -> FineTuningJob:
    return client.post("/fine_tuning/jobs", body=body, cast_to=FineTuningJob)


def test_a_created_job_is_validating_and_complete(client: OpenAI, files: Files) -> None:
    job = client.fine_tuning.jobs.create(**files.body(suffix="shop", seed=42, metadata={"team": "a"}))
    shown = job.to_dict()
    assert shown["object"] == "fine_tuning.job"
    assert shown["status"] == "validating_files"
    assert (shown["seed"], shown["metadata"], shown["user_provided_suffix"]) == (42, {"team": "a"}, "shop")
    assert (shown["error"], shown["hyperparameters"], shown["result_files"]) == (None, {}, [])
    assert shown["trained_tokens"] is None
    reinforcement = shown["method"]["reinforcement"]
    assert reinforcement["tools"][0]["headers"] == {"Authorization": "***"}
    assert reinforcement["hyperparameters"]["batch_size"] == 8
    assert reinforcement["hyperparameters"]["n_epochs"] == "auto"
    assert shown["hone"]["rollouts"] == {"started": 0, "states": {}}
    assert shown["hone"]["plan"] is None
    events = client.fine_tuning.jobs.list_events(job.id)
    assert [event.message for event in events] == [f"Created fine-tuning job: {job.id}"]


def test_every_shape_creates_the_same_job(client: OpenAI, http: httpx.Client, files: Files) -> None:
    canonical = files.body()
    config = canonical["method"]["reinforcement"]
    rft = {**config, "tools": [{"name": TOOL["name"], "url": TOOL["server_url"], "headers": TOOL["headers"]}]}
    base = files.body(method=...)
    with_extras = ReinforcementMethod.construct(**config)
    made = [
        create(client, canonical).to_dict(),
        create(client, {**base, "method": "rft", "rft": rft}).to_dict(),
        client.fine_tuning.jobs.create(**base, method="rft", extra_body={"rft": rft}).to_dict(),  # type: ignore[arg-type]
        client.fine_tuning.jobs.create(**base, extra_body={"method": "rft", "rft": rft}).to_dict(),
        client.fine_tuning.jobs.create(**base, method={"type": "rft", "rft": rft}).to_dict(),  # type: ignore[arg-type]
        client.fine_tuning.jobs.create(
            **base,
            method={"type": "reinforcement", "reinforcement": with_extras},  # type: ignore[typeddict-item]
        ).to_dict(),
        http.post("/v1/fine_tuning/jobs", json={**base, "method": "rft", "rft": rft}).json(),
    ]
    assert all(job["method"] == made[0]["method"] for job in made)
    assert len({job["id"] for job in made}) == len(made)


def test_the_directory_of_a_broken_model_is_for_the_operator_only(
    client: OpenAI, files: Files, settings: Settings
) -> None:
    (settings.models_dir / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(openai.BadRequestError, match="the log of the API says why") as refused:
        client.fine_tuning.jobs.create(**files.body())
    assert str(settings.models_dir) not in str(refused.value.body)


def test_nulls_are_accepted(client: OpenAI, files: Files) -> None:
    job = client.fine_tuning.jobs.create(**files.body(), suffix=None, seed=None, metadata=None, integrations=None)
    assert 0 <= job.seed < 2**31
    assert job.metadata is None


def test_a_strict_client_can_parse_the_answer(live_server: LiveServer, files: Files) -> None:
    strict = OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, _strict_response_validation=True)
    with strict:
        job = strict.fine_tuning.jobs.create(**files.body())
        assert strict.fine_tuning.jobs.retrieve(job.id).id == job.id
        assert [listed.id for listed in strict.fine_tuning.jobs.list()] == [job.id]
        assert len(list(strict.fine_tuning.jobs.list_events(job.id))) == 1
        assert strict.fine_tuning.jobs.cancel(job.id).status == "cancelled"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": "no-such-model"}, "model"),
    ({"model": "ft:tiny:hone::abc"}, "model"),
    ({"training_file": "file-none"}, "training_file"),
    ({"validation_file": "file-none"}, "validation_file"),
    ({"validation_file": None}, "validation_file"),
    ({"method": "rft"}, "rft"),
    ({"method": {"type": "supervised"}}, "method.type"),
    ({"hone": {"speed": 9}}, "hone.speed"),
    ({"hone": {"max_tokens_per_turn": 4096}}, "hone.max_tokens_per_turn"),
    ({"hone": {"lora_rank": 65}}, "hone.lora_rank"),
    (
        {"method": {"type": "rft", "rft": {"grader": GRADER, "hyperparameters": {"batch_size": 0}}}},
        "method.reinforcement.hyperparameters.batch_size",
    ),
]


def test_a_refusal_is_a_400_with_the_path(client: OpenAI, files: Files) -> None:
    for changes, param in REFUSED:
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, files.body(**changes))
        assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")
    assert list(client.fine_tuning.jobs.list()) == []


def test_a_rank_that_no_sampler_takes_names_the_setting(client: OpenAI, files: Files) -> None:
    with pytest.raises(openai.BadRequestError, match=r"65 is above 64.*HONE_SAMPLER_MAX_LORA_RANK"):
        create(client, files.body(hone={"lora_rank": 65}))
    assert create(client, files.body(hone={"lora_rank": 64})).status == "validating_files"


def test_more_staleness_than_a_sampler_has_slots_for_names_the_setting(client: OpenAI, files: Files) -> None:
    with pytest.raises(openai.BadRequestError, match=r"6 needs 8 adapter slots.*HONE_SAMPLER_MAX_ADAPTERS.*at most 5"):
        create(client, files.body(hone={"max_staleness": 6}))
    assert create(client, files.body(hone={"max_staleness": 5})).status == "validating_files"


def test_a_file_of_another_purpose_or_project_is_refused(
    client: OpenAI, live_server: LiveServer, other_key: str, files: Files
) -> None:
    other = client.files.create(file=("a.jsonl", b"{}"), purpose="user_data")
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, files.body(training_file=other.id))
    assert caught.value.param == "training_file"
    with OpenAI(base_url=live_server.base_url, api_key=other_key) as stranger:
        with pytest.raises(openai.BadRequestError) as caught:
            create(stranger, files.body())
        assert caught.value.param == "training_file"


def test_a_broken_body_is_a_400_in_the_envelope(http: httpx.Client) -> None:
    for raw in (b"", b"{", b"[]", b'{"model": NaN}', b"\xff", b'{"a":' + b"[" * 50_000):
        answer = http.post("/v1/fine_tuning/jobs", content=raw, headers={"content-type": "application/json"})
        assert answer.status_code == 400, raw[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_header_values_reach_neither_answers_nor_the_database(
    client: OpenAI, http: httpx.Client, files: Files, database: Database
) -> None:
    job = create(client, files.body())
    for path in ("", f"/{job.id}", f"/{job.id}/events"):
        assert "s3cret" not in http.get(f"/v1/fine_tuning/jobs{path}").text
    async with database.read() as session:
        stored = await session.get(Job, job.id)
    assert stored is not None
    assert "s3cret" not in json.dumps(stored.method)


def test_unknown_top_level_fields_leave_a_warning(client: OpenAI, files: Files) -> None:
    job = client.fine_tuning.jobs.create(**files.body(), extra_body={"trainingType": "GlobalStandard"})
    latest = client.fine_tuning.jobs.list_events(job.id).data[0]
    assert (latest.level, latest.data) == ("warn", {"ignored": ["trainingType"]})


def test_an_idempotency_key_gives_one_job(client: OpenAI, files: Files) -> None:
    headers = {"Idempotency-Key": "order-1"}
    first = client.fine_tuning.jobs.create(**files.body(), extra_headers=headers)
    again = client.fine_tuning.jobs.create(**files.body(), extra_headers=headers)
    assert again.id == first.id
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(**files.body(seed=3), extra_headers=headers)
    assert caught.value.param == "Idempotency-Key"
    assert len(list(client.fine_tuning.jobs.list())) == 1


def test_a_retried_create_gives_one_job_and_two_creates_give_two(http: httpx.Client, files: Files) -> None:
    def post(retries: int) -> str:
        headers = {"x-stainless-retry-count": str(retries)}
        return str(http.post("/v1/fine_tuning/jobs", json=files.body(), headers=headers).json()["id"])

    first = post(0)
    assert post(1) == first
    assert post(2) == first
    assert post(0) != first


def test_a_lost_answer_costs_the_official_client_no_second_job(live_server: LiveServer, files: Files) -> None:
    """The first answer is dropped after the server committed; the SDK retries by itself."""
    httpx2 = pytest.importorskip("httpx2")

    class DropsFirst(httpx2.BaseTransport):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self.inner, self.calls = httpx2.HTTPTransport(), 0

        def handle_request(self, request: Any) -> Any:
            self.calls += 1
            answer = self.inner.handle_request(request)
            if self.calls == 1:
                answer.read()
                answer.close()
                raise httpx2.ReadError("connection lost")
            return answer

        def close(self) -> None:
            self.inner.close()

    transport = DropsFirst()
    http_client = httpx2.Client(transport=transport)
    with OpenAI(base_url=live_server.base_url, api_key=live_server.api_key, http_client=http_client) as client:
        job = client.fine_tuning.jobs.create(**files.body())
        assert transport.calls == 2
        assert [listed.id for listed in client.fine_tuning.jobs.list()] == [job.id]
