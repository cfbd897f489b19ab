"""What we know beforehand about well-known models: renderer, learning rate, LoRA shape, licence.

Does not cover: models outside this table; they get `GENERIC` and may be registered with other values.
The demo model's rate (5e-4) is measured. The others are starting points by size for LoRA with all linear layers, in
the range that published LoRA policy-gradient recipes use; none of them was tuned here, `learning_rate_multiplier` is
for that.
"""

from __future__ import annotations

from dataclasses import dataclass

DEMO_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Known:
    """Defaults of one model. `renderer` as in `BaseModel`; `rate` is the base learning rate; `rank` the LoRA rank."""

    hub_id: str
    renderer: str
    rate: float
    licence: str
    rank: int = 32


GENERIC = Known(hub_id="", renderer="auto", rate=5e-5, licence="unknown")

_APACHE, _LLAMA = "apache-2.0", "llama3.2"
_QWEN_RESEARCH = "qwen-research"

_TABLE = (
    Known("HuggingFaceTB/SmolLM2-135M-Instruct", "hermes", 5e-4, _APACHE, rank=16),
    Known("HuggingFaceTB/SmolLM2-360M-Instruct", "hermes", 2e-4, _APACHE),
    Known("HuggingFaceTB/SmolLM2-1.7B-Instruct", "hermes", 8e-5, _APACHE),
    Known("Qwen/Qwen3-0.6B", "qwen3", 1e-4, _APACHE),
    Known("Qwen/Qwen3-1.7B", "qwen3", 8e-5, _APACHE),
    Known("Qwen/Qwen3-4B", "qwen3", 5e-5, _APACHE),
    Known("Qwen/Qwen3-4B-Instruct-2507", "qwen3", 5e-5, _APACHE),
    Known("Qwen/Qwen3-8B", "qwen3", 3e-5, _APACHE),
    Known("Qwen/Qwen3-14B", "qwen3", 2e-5, _APACHE),
    # No family renderer covers Qwen2.5: its calls are Hermes blocks, so ours fits; the tool preamble differs from its
    # own.
    Known("Qwen/Qwen2.5-0.5B-Instruct", "hermes", 1e-4, _APACHE),
    Known("Qwen/Qwen2.5-1.5B-Instruct", "hermes", 8e-5, _APACHE),
    Known("Qwen/Qwen2.5-3B-Instruct", "hermes", 5e-5, _QWEN_RESEARCH),
    Known("Qwen/Qwen2.5-7B-Instruct", "hermes", 3e-5, _APACHE),
    Known("meta-llama/Llama-3.2-1B-Instruct", "llama-3", 8e-5, _LLAMA),
    Known("meta-llama/Llama-3.2-3B-Instruct", "llama-3", 5e-5, _LLAMA),
)

KNOWN = {entry.hub_id.rpartition("/")[2].lower(): entry for entry in _TABLE}


def model_id_of(name: str) -> str:
    """The catalogue id of a hub name: its last part in lower case (`Qwen/Qwen3-0.6B` → `qwen3-0.6b`)."""
    return name.rstrip("/").rpartition("/")[2].lower()


def known(name: str) -> Known | None:
    """The entry for a hub id or a catalogue id. Someone else's copy under the same last name is not the known model."""
    entry = KNOWN.get(model_id_of(name))
    if entry is None or ("/" in name and name.lower() != entry.hub_id.lower()):
        return None
    return entry
