"""What the job tests start from: an installed model, uploaded files, a create body.

Does not cover: the server (`conftest`) and rows that only a worker writes (`tests.db.rows`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openai import OpenAI

from app.core.settings import Settings
from app.models.catalogue import BaseModel, write_card
from tests.db.rows import GRADER, dataset

MODEL = "tiny"
TOOL = {"name": "lookup", "server_url": "http://127.0.0.1:9/lookup", "headers": {"Authorization": "Bearer s3cret"}}


def install_model(settings: Settings) -> None:
    """A catalogue entry; nothing loads its files here."""
    directory = settings.models_dir / MODEL
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_text("{}")
    model = BaseModel(
        id=MODEL,
        path=directory,
        renderer="hermes",
        context=2048,
        lora_targets=("q_proj",),
        base_learning_rate=1e-4,
        lora_rank=8,
        licence="Apache-2.0",
        hub_id=None,
        created=0,
    )
    write_card(directory, model, {})


@dataclass(frozen=True)
class Files:
    train: str
    valid: str

    def body(self, **changes: Any) -> dict[str, Any]:
        """A right create body; a change to `...` leaves the field out."""
        made = {
            "model": MODEL,
            "training_file": self.train,
            "validation_file": self.valid,
            "method": {
                "type": "reinforcement",
                "reinforcement": {"grader": GRADER, "tools": [TOOL], "hyperparameters": {"batch_size": 8}},
            },
            **changes,
        }
        return {key: value for key, value in made.items() if value is not ...}


def upload(client: OpenAI) -> Files:
    train = client.files.create(file=("train.jsonl", dataset(12)), purpose="fine-tune")
    valid = client.files.create(file=("valid.jsonl", dataset(4, start=100)), purpose="fine-tune")
    return Files(train.id, valid.id)
