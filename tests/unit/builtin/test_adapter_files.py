"""An adapter is merged exactly as its config says, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from workers.sampler.builtin.adapters import merge_adapter
from workers.sampler.builtin.generation import AdapterRefused

PRISTINE = {
    "layers.0.q_proj": torch.randn(6, 4, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "layers.0.up_proj": torch.randn(8, 4, generator=torch.Generator().manual_seed(2)).bfloat16(),
}


def adapter(path: Path, *, b: float = 0.5, targets: Any = ("q_proj",), **config: Any) -> Path:
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": targets, "bias": "none"} | config
    (path / "adapter_config.json").write_text(json.dumps(raw))
    tensors = {
        "base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 4),
        "base_model.model.layers.0.q_proj.lora_B.weight": torch.full((6, 2), b),
    }
    save_file(tensors, path / "adapter_model.safetensors")
    return path


def test_the_merge_is_the_base_plus_scaled_product(tmp_path: Path) -> None:
    merged = dict(merge_adapter(adapter(tmp_path), PRISTINE, max_rank=16))
    assert merged.keys() == {"layers.0.q_proj"}
    assert torch.equal(merged["layers.0.q_proj"], PRISTINE["layers.0.q_proj"].float() + 4 * torch.ones(6, 4))


def test_rslora_scales_by_the_square_root_of_the_rank(tmp_path: Path) -> None:
    merged = dict(merge_adapter(adapter(tmp_path, use_rslora=True), PRISTINE, max_rank=16))
    change = merged["layers.0.q_proj"] - PRISTINE["layers.0.q_proj"].float()
    assert change == pytest.approx(torch.full((6, 4), 8 / 2**0.5), abs=1e-5)


def test_b_zero_gives_the_base_bit_for_bit(tmp_path: Path) -> None:
    merged = dict(merge_adapter(adapter(tmp_path, b=0.0), PRISTINE, max_rank=16))["layers.0.q_proj"]
    assert torch.equal(merged.bfloat16().view(torch.int16), PRISTINE["layers.0.q_proj"].view(torch.int16))


@pytest.mark.parametrize("targets", [["layers.0.q_proj"], r".*\.q_proj"])
def test_targets_are_names_or_a_pattern(tmp_path: Path, targets: Any) -> None:
    assert dict(merge_adapter(adapter(tmp_path, targets=targets), PRISTINE, max_rank=16)).keys() == {"layers.0.q_proj"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": "all-linear"}, "missing"),
        ({"targets": ["k_proj"]}, "no linear layer"),
        ({"targets": None}, "target_modules"),
        ({"r": 4}, "shape"),
        ({"r": 32}, "1 to 16"),
        ({"r": "2"}, "1 to 16"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"b": float("nan")}, "finite"),
        ({"b": float("inf")}, "finite"),
        ({"peft_type": "LOHA"}, "LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
    ],
)
def test_what_cannot_be_served_faithfully_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterRefused, match=words):
        merge_adapter(adapter(tmp_path, **changes), PRISTINE, max_rank=16)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"xx")
    with pytest.raises(AdapterRefused, match="cannot be read"):
        merge_adapter(tmp_path, PRISTINE, max_rank=16)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterRefused, match="not JSON"):
        merge_adapter(tmp_path, PRISTINE, max_rank=16)
