"""No secret of a run is left anywhere, though the user's servers repeat every header that they are sent; logs are JSON.

Does not cover: the secrets of requests that were refused, and other databases (`tests/api/test_secret_canary.py`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from app.rollouts.traces import unpack
from tests.canary import found_in, left_in
from tests.e2e.service import Service, row
from tests.e2e.teach import LOOKUP, question

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]

TOOL, COOKIE, GRADE = "canary-tool-91d4e7", "canary-cookie-5f20ab", "canary-grade-c3118e"
VAULT = "canary-vault-8b1f02c7d94e4e1fa6b35d"  # what seals the others
MODEL = "tiny-llama"


@dataclass(frozen=True)
class Left:
    """What two ended jobs left: texts by place, the jobs, how often the servers said something back, what is secret."""

    texts: dict[str, str]
    jobs: dict[str, Any]
    echoed: dict[str, int]
    secrets: list[str]


@pytest.fixture(scope="module")
def left(taught_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    root = tmp_path_factory.mktemp("secrets")
    with Service(root, taught_models, HONE_LOG_FORMAT="json", HONE_SECRET_KEY=VAULT) as service:
        hook = service._hone("webhooks", "add", f"{service.agent_url}/echo/hook").strip()
        jobs = {tool: service.wait(create(service, tool).id) for tool in ("lookup", "broken")}
        service._await(lambda: len(service.seen()["events"]) == 4, 40)  # of both jobs, each at its second attempt
        texts = answers(service, [job.id for job in jobs.values()])
        echoed = service.seen()["echoed"]
    texts |= {**left_in(root / "data"), **read_by_the_model(root / "data"), "stdout": (root / "up.log").read_text()}
    secrets = [TOOL, COOKIE, GRADE, VAULT, hook.removeprefix("whsec_"), service.key.removeprefix("sk-hone-")]
    return Left(texts, jobs, echoed, secrets)


def create(service: Service, tool: str) -> Any:
    """A job of three steps whose tool and grader repeat what they are sent."""
    files = [service.upload(f"{n}.jsonl", "\n".join(json.dumps(row(i)) for i in range(n)).encode()) for n in (12, 6)]
    headers = {"Authorization": f"Bearer {TOOL}", "Cookie": f"session={COOKIE}; theme=dark"}
    endpoint = {"type": "endpoint", "name": "g", "url": f"{service.agent_url}/echo/grade", "headers": {"X-Key": GRADE}}
    reinforcement = {
        "grader": {"type": "multi", "name": "m", "graders": {"g": endpoint}, "calculate_output": "g"},
        "tools": [{"name": "lookup", "server_url": f"{service.agent_url}/echo/{tool}", "headers": headers}],
        "max_episode_steps": 3,
        "hyperparameters": {"n_epochs": 1, "batch_size": 4, "eval_interval": 3, "compute_multiplier": 0.5},
    }
    return service.client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=files[0],
        validation_file=files[1],
        seed=7,
        method={"type": "reinforcement", "reinforcement": reinforcement},  # type: ignore[arg-type]
        extra_body={"hone": {"max_tokens_per_turn": 48, "learning_rate": 1e-3}},
    )


def answers(service: Service, jobs: list[str]) -> dict[str, str]:
    """All that the API says of these jobs, to a client and to whoever watches; refusals, too."""
    found: dict[str, str] = {}
    key = {"Authorization": f"Bearer {service.key}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{service.port}", headers=key, timeout=60) as http:

        def ask(path: str, body: Any = None) -> Any:
            answer = http.get(path) if body is None else http.post(path, json=body)
            found[f"answer {len(found)} {path}"] = f"{answer.headers} {answer.text}"
            return answer

        for path in ("/metrics", "/healthz", "/readyz", "/v1/models", "/v1/files", "/v1/fine_tuning/jobs"):
            ask(path)
        for job_id in jobs:
            job = f"/v1/fine_tuning/jobs/{job_id}"
            shown = ask(job).json()
            for path in ("events?limit=100", "checkpoints", "rollouts?limit=100"):
                ask(f"{job}/{path}")
            for rollout in service.rollouts(job_id):
                ask(f"{job}/rollouts/{rollout['id']}")
            for file_id in (shown["training_file"], *shown["result_files"]):
                ask(f"/v1/files/{file_id}/content")
            chat = {"messages": question("hat"), "tools": [LOOKUP], "max_tokens": 40}
            ask("/v1/chat/completions", {**chat, "model": shown["fine_tuned_model"] or "ft:unknown"})
            for verb in ("pause", "resume", "cancel"):
                ask(f"{job}/{verb}", {})
    return found


def read_by_the_model(data: Path) -> dict[str, str]:
    """The token ids of all traces as text."""
    tokenizer = Tokenizer.from_file(str(data / "models" / MODEL / "tokenizer.json"))
    texts = {}
    for path, text in left_in(data).items():
        if path.endswith(".zst"):
            ids = [unpack(json.loads(line)["tokens"]["ids"], "ids") for line in text.split("\n") if line]
            texts[f"tokens of {path}"] = "\n".join(tokenizer.decode(each, skip_special_tokens=False) for each in ids)
    return texts


def log_lines(left: Left, suffix: str) -> list[dict[str, Any]]:
    """Of all logs with this end, each line read as JSON."""
    names = [name for name in left.texts if name.startswith("logs/") and name.endswith(suffix)]
    assert names
    return [json.loads(line) for name in names for line in left.texts[name].split("\n") if line]


def test_no_secret_is_left_anywhere(left: Left) -> None:
    found = {place: hits for place, text in left.texts.items() if (hits := found_in(text, left.secrets))}
    assert found == {}


def test_the_servers_did_repeat_what_they_were_sent(left: Left) -> None:
    assert {tool: job.status for tool, job in left.jobs.items()} == {"lookup": "succeeded", "broken": "failed"}
    assert left.echoed.keys() == {"lookup", "broken", "grade", "hook"}
    assert "***" in left.jobs["broken"].error.message
    job = left.jobs["lookup"].id
    for start in (f"traces/{job}/", f"tokens of traces/{job}/"):
        places = [text for place, text in left.texts.items() if place.startswith(start)]
        assert places
        assert all("***" in text for text in places)


def test_every_line_of_a_log_is_json_and_a_workers_line_says_whose_it_is(left: Left) -> None:
    for name in ("runner.log", "keeper.log"):
        assert all({"time", "level", "logger", "message"} <= line.keys() for line in log_lines(left, name))
    for job in left.jobs.values():
        lines = [line for line in log_lines(left, f"{job.id}.supervisor.log") if line["logger"].startswith("hone")]
        assert lines
        assert {(line["job_id"], line["attempt"]) for line in lines} == {(job.id, 1)}
    rollouts = [line for line in log_lines(left, f"{left.jobs['broken'].id}.supervisor.log") if "trace_id" in line]
    assert rollouts
    assert all(line["trace_id"].startswith("trace_") for line in rollouts)
