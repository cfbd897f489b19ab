"""A short job on a real vLLM, fp32 on the CPU: it succeeds, sampler and trainer agree, and no process is left behind.

Runs where HONE_TEST_VLLM_PYTHON names the Python of vLLM's environment (`make test-vllm`).
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.service import Service
from tests.e2e.teach import teach
from tests.processes import family, gone
from tests.tiny import make_tiny_llama

PYTHON = os.environ.get("HONE_TEST_VLLM_PYTHON")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.skipif(PYTHON is None, reason="HONE_TEST_VLLM_PYTHON is not set (make test-vllm)"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    models = tmp_path_factory.mktemp("taught") / "models"
    teach(make_tiny_llama(models / "tiny-llama", head_dim=32))  # the smallest head that vLLM's CPU attention takes
    settings = {
        "HONE_SAMPLER_ENGINE": "vllm",
        "HONE_VLLM_PYTHON": str(Path(PYTHON or "").absolute()),
        "HONE_VLLM_CPU_KV_GIB": "1",
        "HONE_SAMPLER_MAX_LORA_RANK": "8",
    }
    with Service(tmp_path_factory.mktemp("service"), models, **settings) as running:
        yield running


def servers(service: Service) -> list[int]:
    """Leaders of the process groups in which this installation's vLLM servers run."""
    return service.processes("workers.leash", "vllm.entrypoints")


def test_a_job_succeeds_on_vllm_and_its_log_probs_are_the_trainers(service: Service) -> None:
    # On-policy: with overlap a batch is a step old, and the difference is that step.
    job = service.wait(service.create_job("tiny-llama", steps=3, hone={"max_staleness": 0}).id, timeout_s=400)

    assert job.status == "succeeded", job.to_json(warnings=False)
    assert len(servers(service)) == 1
    steps = [event.data for event in service.events(job.id) if event.type == "metrics" and "policy" in event.data]
    assert {step["step"] for step in steps} == {1, 2, 3}
    assert max(step["policy"]["mismatch_max"] for step in steps) <= 1e-4
    states = Counter(each["state"] for each in service.rollouts(job.id))
    assert states["trained"] > 0
    assert "started" not in states
    assert sum(states.values()) == job.hone["rollouts"]["started"]


def test_a_keeper_that_is_killed_takes_vllm_with_it(service: Service) -> None:
    (group,) = servers(service)
    assert len(family(group)) >= 3  # leash, API server, engine
    os.kill(service.processes("workers.sampler.keeper")[-1], signal.SIGKILL)
    assert gone(group)


def test_nothing_is_left_when_the_service_stops(service: Service) -> None:
    service._await(lambda: servers(service), 60)  # the next keeper starts vLLM again: it is still wanted
    groups = servers(service)
    service.__exit__(None, None, None)
    assert all(gone(group) for group in groups)
    assert servers(service) == []
