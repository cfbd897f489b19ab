"""Models on the wire (contract §11).

Does not cover: what the service itself knows about a base model (`catalogue.BaseModel`).
"""

from __future__ import annotations

from typing import Literal

import pydantic


class ModelObject(pydantic.BaseModel):
    """A base model, a fine-tuned model or a checkpoint: whatever `model` may be in a chat request."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class ModelList(pydantic.BaseModel):
    """All of them: this list has one page."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
    has_more: Literal[False] = False
