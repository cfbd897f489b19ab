"""A tiny model that does the agent task, and where the installed small model is: what both sides of a benchmark load.

Does not cover: the service's own trainer; this is plain supervised learning on the rendered text. The tiny model is
made in about half a minute, once per recipe, and kept below the system's temporary directory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.models.catalogue import CARD, BaseModel, Catalogue
from app.rendering.registry import load_renderer
from benchmarks.harness.agent_task import ITEMS, SYSTEM, TOOLS, episode
from tests.tiny import make_tiny_llama

SMALL = "smollm2-135m-instruct"
TINY = "tiny-agent"
RECIPE = 1  # raise it when the task or the teaching changes
STEPS = 400


class NoModel(Exception):
    """The installed model is not there; the message says how to get it."""


def installed(model_id: str = SMALL) -> BaseModel:
    """From $HONE_DATA/models, $HONE_DATA_DIR/models or the cache that `hone models pull` fills. Raises NoModel."""
    data = [Path(os.environ[name]) / "models" for name in ("HONE_DATA", "HONE_DATA_DIR") if os.environ.get(name)]
    places = [*data, Path("~/.cache/hone/models").expanduser()]
    for place in places:
        found = [model for model in Catalogue(place).list() if model.id == model_id]
        if found:
            return found[0]
    raise NoModel(f"{model_id} is in none of {', '.join(map(str, places))}: `hone models pull {model_id}`")


def taught(steps: int = STEPS) -> BaseModel:
    """The tiny model of this recipe, made on first use."""
    return kept(f"{TINY}-r{RECIPE}-s{steps}", TINY, lambda directory: _make(directory, steps))


def taught_long(context: int, steps: int = STEPS) -> BaseModel:
    """The same weights with a longer context: it calls its tools as before, and what it says far on is noise."""
    name = f"{TINY}-r{RECIPE}-s{steps}-c{context}"
    return kept(name, TINY, lambda directory: _lengthen(taught(steps), context, directory))


def kept(name: str, model_id: str, make: Callable[[Path], object]) -> BaseModel:
    """The model directory that `make` wrote into `<temporary>/hone-bench-models/<name>/<model_id>`."""
    place = Path(tempfile.gettempdir()) / "hone-bench-models" / name
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=place.parent))
        try:
            make(scratch / model_id)
            scratch.rename(place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return Catalogue(place).get(model_id)


def _make(directory: Path, steps: int) -> None:
    teach(make_tiny_llama(directory), steps=steps)


def _lengthen(model: BaseModel, context: int, directory: Path) -> None:
    shutil.copytree(model.path, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": context}))
    card = json.loads((directory / CARD).read_text())
    (directory / CARD).write_text(json.dumps({**card, "context": context}))


def teach(model: BaseModel, *, steps: int, seed: int = 0) -> None:
    """Train all weights in place until the model mostly does the task, and still errs often enough to learn from."""
    import torch
    from transformers import AutoModelForCausalLM

    renderer = load_renderer(model)
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    network = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = [_rendered(renderer, rng) for _ in range(8)]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])
        loss = network(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.save_pretrained(model.path)


def _rendered(renderer: Any, rng: random.Random) -> list[int]:
    """An episode's ids without the opening of the turn that would follow."""
    digits = [str(rng.randint(10, 99)) for _ in range(4)]
    messages = [{"role": "system", "content": SYSTEM}, *episode(rng.sample(ITEMS, 2), digits[:2], digits[2:])]
    shorter = renderer.prompt(messages, TOOLS)
    longer = renderer.prompt([*messages, {"role": "user", "content": "x"}], TOOLS)
    common = 0
    while common < len(shorter) and shorter[common] == longer[common]:
        common += 1
    ids: list[int] = shorter[:common]
    return ids
