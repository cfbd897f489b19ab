"""The doctor on samplers: which engine, why, with what command; GPUs in shares; adapter slots counted."""

from __future__ import annotations

import base64
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from app.cli import doctor_sampler
from app.cli.doctor_sampler import redacted, sampler, slots
from app.cli.findings import Verdict
from app.core.settings import Settings
from tests.tiny import make_weightless_llama

VLLM = {
    "engine": "vllm", "why": "2 GPUs and /v/python", "slow": None, "servers": 1, "jobs": 1, "gpus": ["0: a", "1: b"],
    "dtype": "bfloat16", "tensor_parallel": 1, "max_loras": 8, "max_lora_rank": 64,
    "shares": {"samplers": [[0]], "trainer": [1], "sampler_memory": 0.9, "trainer_memory": 0.9, "shared": False},
    "commands": [["/v/python", "-m", "vllm", "--max-loras", "8", "--api-key", "abc"]],
    "environments": [{"CUDA_VISIBLE_DEVICES": "0"}],
}  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


def shown(settings: Settings) -> dict[str, str]:
    return {finding.name: finding.detail for finding in sampler(settings)}


def test_the_engine_and_the_reason_come_from_the_worker_side(settings: Settings) -> None:
    found = shown(settings)
    assert found["sampler"].startswith("builtin (")
    assert "not measured: vLLM on a GPU" in found["claims"]
    assert "command" not in found


def test_a_vllm_that_is_asked_for_is_shown_with_its_command(settings: Settings) -> None:
    make_weightless_llama(settings.models_dir / "tiny")
    found = shown(settings.model_copy(update={"sampler_engine": "vllm", "vllm_python": Path(sys.executable)}))
    assert found["sampler"].startswith("vllm (")
    assert f"{sys.executable} -m vllm.entrypoints.openai.api_server" in found["command"]
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in found["command"]


def test_an_engine_that_cannot_be_had_blocks(settings: Settings) -> None:
    [finding] = sampler(settings.model_copy(update={"vllm_python": Path("/nonexistent")}))
    assert (finding.verdict, finding.detail) == (Verdict.PROBLEM, "HONE_VLLM_PYTHON: /nonexistent cannot be run")


def test_shares_of_the_gpus_are_told(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_sampler, "describe", lambda _: VLLM)
    found = shown(settings)
    assert found["gpu share"] == "disjoint: sampler GPU 0 at 90% of its memory, trainer GPU 1 at 90%"
    monkeypatch.setattr(doctor_sampler, "describe", lambda _: {**VLLM, "jobs": 2})
    assert shown(settings)["gpu share"].endswith("trainer GPU 1 at 90% divided by 2 jobs")
    assert "--api-key ***" in found["command"]


def test_a_gpu_that_nothing_samples_on_is_a_warning_with_what_to_do(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: dict[str, Any] = {**VLLM, "engine": "builtin", "slow": "install vllm", "shares": None}
    monkeypatch.setattr(doctor_sampler, "describe", lambda _: slow)
    first = next(sampler(settings))
    assert (first.verdict, first.fix) == (Verdict.WARNING, "install vllm")


def test_a_url_that_does_not_answer_is_named(settings: Settings) -> None:
    first = next(sampler(settings.model_copy(update={"sampler_urls": "http://127.0.0.1:9"})))
    assert first.verdict is Verdict.WARNING
    assert "http://127.0.0.1:9 does not answer" in first.detail


def test_user_and_password_of_a_url_are_sent_and_not_shown(settings: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port, heard = listener.getsockname()[1], []

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                heard.append(connection.recv(4096))
                connection.sendall(b'HTTP/1.0 200 OK\r\n\r\n{"data": [{"id": "tiny"}]}')

        server = threading.Thread(target=answer)
        server.start()
        first = next(sampler(settings.model_copy(update={"sampler_urls": f"http://me:canary@127.0.0.1:{port}"})))
        server.join(5)
    assert first.detail == f"http://127.0.0.1:{port} serves tiny"
    assert b"Authorization: Basic " + base64.b64encode(b"me:canary") in heard[0]


@pytest.mark.parametrize(("held", "runners", "fits"), [(8, 2, True), (8, 3, False), (4, 1, True), (3, 1, False)])
def test_slots_are_counted_against_the_jobs_that_run_at_once(
    settings: Settings, held: int, runners: int, fits: bool
) -> None:
    finding = slots(settings.model_copy(update={"sampler_max_adapters": held, "runner_slots": runners}), 64)
    assert (finding.verdict is Verdict.OK) == fits
    assert fits or finding.fix == f"HONE_SAMPLER_MAX_ADAPTERS={runners * 3 + 1}"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (["vllm", "--api-key", "s"], "vllm --api-key ***"),
        (["vllm", "--hf-token=s", "--port", "1"], "vllm --hf-token=*** --port 1"),
        (["vllm", "--max-num-batched-tokens", "64"], "vllm --max-num-batched-tokens 64"),
    ],
)
def test_secrets_in_a_command_are_not_shown(command: list[str], line: str) -> None:
    assert redacted(command).replace("'", "") == line
