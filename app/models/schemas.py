"""Models on the wire (contract §11).

Does not cover: what the service itself knows about a base model (`catalogue.BaseModel`).
"""

from __future__ import annotations

from typing import Literal

import pydantic


class HistoryCheck(pydantic.BaseModel):
    """How the chat format treats a history that goes on; found once, when the model was registered."""

    append_only: bool | None = pydantic.Field(
        None, description="Every tool turn extends the token ids to what a render of the whole conversation gives."
    )
    bridges: bool | None = pydantic.Field(
        None, description="Every tool turn extends the token ids; false: rollouts may start new roots."
    )
    control_tokens_inert: bool | None = pydantic.Field(None, description="Text in messages cannot close a turn.")
    cases: dict[str, Literal["exact", "bridged", "new_root", "refused"]] = {}
    differs: list[str] = []
    warnings: list[str] = []


class BaseModelFacts(pydantic.BaseModel):
    """What this service knows about a base model, beyond OpenAI's object."""

    renderer: str
    context: int
    licence: str
    history: HistoryCheck


class ModelObject(pydantic.BaseModel):
    """A base model, a fine-tuned model or a checkpoint: whatever `model` may be in a chat request."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    hone: BaseModelFacts | None = pydantic.Field(None, description="Of base models only.")


class ModelList(pydantic.BaseModel):
    """All of them: this list has one page."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
    has_more: Literal[False] = False
