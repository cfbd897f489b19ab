"""A session against a scripted supervisor: publication, order, resume, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_policy import Supervisor, make_rows, make_start, make_step, save_model
from transformers import AutoModelForCausalLM

from workers.batch import BatchError
from workers.messages import LoraSpec, Message, Progress, ProtocolError, Published, Ready, Start, StepDone, Stop
from workers.trainer.durable import AlreadyPublished
from workers.trainer.model import UnsupportedModel
from workers.trainer.publish import BrokenAdapter
from workers.trainer.session import Session
from workers.trainer.snapshot import BrokenSnapshot


def run(start: Start, root: Path, steps: range) -> Supervisor:
    supervisor = Supervisor([make_step(root, step, make_rows(step)) for step in steps])
    Session(start, supervisor).run()
    return supervisor


def base_log_probs(model: Path, canary: list[list[int]], adapter: str | None = None) -> list[list[float]]:
    """What anyone else computes with transformers and PEFT from the files on disk."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        policy = PeftModel.from_pretrained(policy, adapter)
    scores = []
    with torch.no_grad():
        for row in canary:
            logits = policy(input_ids=torch.tensor([row])).logits[0, :-1]
            scores.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist())
    return scores


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row])


def test_v0_has_b_zero_and_scores_like_the_base(llama: Path, tmp_path: Path) -> None:
    start = make_start(tmp_path, llama)
    (ready,) = run(start, tmp_path, range(0)).of(Ready)
    tensors = load_file(Path(ready.adapter.path) / "adapter_model.safetensors")
    assert all((tensor == 0).all() == (".lora_B." in name) for name, tensor in tensors.items())
    canary = json.loads(Path(start.canary).read_text())
    scores = json.loads(Path(ready.adapter.canary_log_probs).read_text())
    assert (flat(scores) - flat(base_log_probs(llama, canary))).abs().max() < 1e-5
    assert (ready.step, ready.adapter.name) == (0, "job-a1-v0")


def test_a_published_version_is_what_peft_loads_from_disk(llama: Path, tmp_path: Path) -> None:
    start = make_start(tmp_path, llama)
    done = run(start, tmp_path, range(1, 3)).of(StepDone)[-1]
    canary = json.loads(Path(start.canary).read_text())
    ours = json.loads(Path(done.adapter.canary_log_probs).read_text())
    theirs = base_log_probs(llama, canary, done.adapter.path)
    assert (flat(ours) - flat(theirs)).abs().max() < 1e-5
    assert (flat(ours) - flat(base_log_probs(llama, canary))).abs().max() > 1e-2
    for path in Path(done.adapter.path).iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
    assert Path(done.adapter.path).stat().st_mode & 0o777 == 0o755


def test_a_model_with_sliding_windows_trains_on_padded_rows(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "mistral", window=16)
    start = make_start(tmp_path, model)
    (done,) = run(start, tmp_path, range(1, 2)).of(StepDone)
    canary = json.loads(Path(start.canary).read_text())
    ours = json.loads(Path(done.adapter.canary_log_probs).read_text())
    assert (flat(ours) - flat(base_log_probs(model, canary, done.adapter.path))).abs().max() < 1e-5
    assert done.metrics["forwarded_tokens"] >= done.metrics["raw_tokens"]


def test_version_k_is_published_before_batch_k_plus_1_is_asked_for(llama: Path, tmp_path: Path) -> None:
    class Watching(Supervisor):
        def receive(self) -> Message:
            seen.append(sorted(p.name for p in (tmp_path / "adapters").iterdir()))
            answered.append(len(self.of(StepDone)) + len(self.of(Ready)))
            return super().receive()

    seen: list[list[str]] = []
    answered: list[int] = []
    start = make_start(tmp_path, llama, total_steps=2)
    Session(start, Watching([make_step(tmp_path, k, make_rows(k)) for k in (1, 2)])).run()
    assert seen == [[f"job-a1-v{n}" for n in range(k)] for k in (1, 2, 3)]
    assert answered == [1, 2, 3]


def test_resume_is_bit_exact(llama: Path, tmp_path: Path) -> None:
    straight = run(make_start(tmp_path, llama), tmp_path, range(1, 4)).of(StepDone)
    start = make_start(tmp_path, llama, attempt=2, snapshot=straight[1].snapshot)
    resumed = run(start, tmp_path, range(3, 4))
    (ready,), (done,) = resumed.of(Ready), resumed.of(StepDone)
    assert (ready.step, ready.adapter.name) == (2, "job-a2-v2")
    assert ready.adapter.sha256 == straight[1].adapter.sha256
    assert done.adapter.sha256 == straight[2].adapter.sha256
    assert done.snapshot_sha256 == straight[2].snapshot_sha256


def test_a_resume_with_masks_and_kl_is_bit_exact(llama: Path, tmp_path: Path) -> None:
    extras: dict[str, Any] = {"beta": 0.1, "importance_range": (0.1, 9.0), "max_sequence_tv": 4.0}
    straight = run(make_start(tmp_path, llama, **extras), tmp_path, range(1, 4)).of(StepDone)
    assert straight[0].metrics["masked_token_share"] > 0
    start = make_start(tmp_path, llama, attempt=2, snapshot=straight[0].snapshot, **extras)
    resumed = run(start, tmp_path, range(2, 4)).of(StepDone)
    assert [done.adapter.sha256 for done in resumed] == [done.adapter.sha256 for done in straight[1:]]
    assert resumed[-1].snapshot_sha256 == straight[-1].snapshot_sha256


def test_a_run_that_was_complete_publishes_again_and_waits(llama: Path, tmp_path: Path) -> None:
    first = run(make_start(tmp_path, llama, total_steps=1), tmp_path, range(1, 2)).of(StepDone)[0]
    start = make_start(tmp_path, llama, attempt=2, total_steps=1, snapshot=first.snapshot)
    again = run(start, tmp_path, range(0))
    assert again.of(Ready)[0].adapter.sha256 == first.adapter.sha256
    assert again.of(StepDone) == []


def test_learning_moves_the_adapter_and_reports_it(llama: Path, tmp_path: Path) -> None:
    supervisor = run(make_start(tmp_path, llama), tmp_path, range(1, 4))
    done = supervisor.of(StepDone)
    adapters: list[Published] = [message.adapter for message in done]
    assert len({adapter.sha256 for adapter in adapters}) == 3
    for message in done:
        assert message.metrics["forwarded_tokens"] < message.metrics["raw_tokens"] / 2
        assert message.metrics["trained_tokens"] > 0
        assert message.metrics["grad_norm"] > 0
        assert set(message.seconds) == {"update", "canary", "publication", "snapshot"}
    assert {p.phase for p in supervisor.of(Progress)} == {"load", "update", "canary", "publication"}


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_snapshot_is_refused(file: str, llama: Path, tmp_path: Path) -> None:
    done = run(make_start(tmp_path, llama), tmp_path, range(1, 2)).of(StepDone)[0]
    path = Path(done.snapshot) / file
    path.write_bytes(path.read_bytes()[:-2] + b"!!")
    with pytest.raises(BrokenSnapshot):
        run(make_start(tmp_path, llama, attempt=2, snapshot=done.snapshot), tmp_path, range(0))


def test_a_name_is_never_published_twice(llama: Path, tmp_path: Path) -> None:
    run(make_start(tmp_path, llama), tmp_path, range(0))
    with pytest.raises(AlreadyPublished, match="job-a1-v0"):
        run(make_start(tmp_path, llama), tmp_path, range(0))


def test_a_lora_target_that_matches_nothing_is_refused(llama: Path, tmp_path: Path) -> None:
    start = make_start(tmp_path, llama, lora=LoraSpec(4, 8, ("q_proj", "query")))
    with pytest.raises(UnsupportedModel, match="query"):
        run(start, tmp_path, range(0))


def test_a_batch_with_another_digest_is_refused(llama: Path, tmp_path: Path) -> None:
    step = make_step(tmp_path, 1, make_rows(1))
    with pytest.raises(BatchError, match="sha256"):
        Session(make_start(tmp_path, llama), Supervisor([replace(step, sha256="0" * 64)])).run()


def test_a_step_out_of_order_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match="expected step 1"):
        run(make_start(tmp_path, llama), tmp_path, range(2, 3))


def test_stop_ends_the_session_between_steps(llama: Path, tmp_path: Path) -> None:
    supervisor = Supervisor([make_step(tmp_path, 1, make_rows(1)), Stop()])
    Session(make_start(tmp_path, llama), supervisor).run()
    assert [message.step for message in supervisor.of(StepDone)] == [1]


def test_an_adapter_that_is_not_finite_is_never_published(llama: Path, tmp_path: Path) -> None:
    rows = [replace(row, advantage=float("nan")) for row in make_rows(1)]
    supervisor = Supervisor([make_step(tmp_path, 1, rows)])
    with pytest.raises(BrokenAdapter, match="not finite"):
        Session(make_start(tmp_path, llama), supervisor).run()
    assert [p.name for p in (tmp_path / "adapters").iterdir()] == ["job-a1-v0"]
