"""On a CUDA device: the packed update runs, and its log-probs are those of plain transformers."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]


def test_packed_log_probs_equal_the_plain_forward() -> None:
    from benchmarks.harness import adapters, shapes
    from workers.trainer.scoring import score_rows

    policy = adapters.random_policy(shapes.random_model("tiny", "float32"), "float32", 8)
    rows = [[(7 * at + row) % 500 for at in range(64 + 9 * row)] for row in range(4)]
    packed = score_rows(policy, rows, 1.0)
    policy.get_base_model().set_attn_implementation("eager")
    for ids, scores in zip(rows, packed, strict=True):
        logits = policy(input_ids=torch.tensor([ids], device="cuda"), use_cache=False).logits[0, :-1].float()
        plain = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:], device="cuda")[:, None])[:, 0]
        assert (plain.detach().cpu() - torch.tensor(scores)).abs().max() < 1e-3


def test_the_trainer_benchmark_takes_steps_in_bf16(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.gpu.trainer_tokens import rows_of, step_seconds
    from benchmarks.harness import adapters, shapes

    policy = adapters.random_policy(shapes.random_model("tiny", "bfloat16"), "bfloat16", 8)
    seconds = step_seconds(policy, rows_of(2048, 512, 500), 3)
    assert len(seconds) == 3
    assert "4 micro-batches" not in capsys.readouterr().out  # 2,048 tokens fit a GPU at once
