"""Which renderer a base model gets, built once per model and shared by all threads.

Does not cover: the check of a renderer at registration (`check`).
"auto" trusts the hub id alone: two models of one architecture may have different templates. A model that the
`renderers` package does not know gets `hermes` when it speaks ChatML and its own template knows no tools; otherwise
the operator must choose.
"""

from __future__ import annotations

import logging
from functools import cache
from threading import Lock
from typing import Any

from renderers import Renderer, config_from_name, create_renderer
from renderers.base import MODEL_RENDERER_MAP, MULTIMODAL_MODELS

from app.models.catalogue import BaseModel
from app.rendering.family import FamilyRenderer
from app.rendering.hermes import CALL_CLOSE, HermesRenderer
from app.rendering.protocol import ChatRenderer, NoRenderer
from app.rendering.tokens import TextTokenizer

logger = logging.getLogger(__name__)

HERMES = "hermes"
# Formats whose calls end with this text; the others stop at their end-of-turn token only.
XML_CALLS = frozenset(
    {
        HERMES,
        "qwen3",
        "prime-qwen3",
        "qwen3-vl",
        "qwen3.5",
        "qwen3.6",
        "qwen3.8",
        "glm-4.5",
        "glm-5",
        "glm-5.1",
        "glm-5.3",
    }
)

_PROBE_SCHEMA = {"type": "object", "properties": {}}
_PROBE_TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": _PROBE_SCHEMA}}
]
_PROBE: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Look."},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": {}}}]},
    {"role": "tool", "content": "1", "tool_call_id": "call_1", "name": "look"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": "Again."},
]  # fmt: skip

_loaded: dict[tuple[str, str, int], ChatRenderer] = {}
_loading = Lock()


def load_renderer(model: BaseModel) -> ChatRenderer:
    """The renderer of a registered model, from the cache when its tokenizer file has not changed. Raises NoRenderer."""
    try:
        changed = (model.path / "tokenizer.json").stat().st_mtime_ns
    except OSError as error:
        raise NoRenderer(f"{model.path}: no tokenizer.json ({error})") from error
    key = (str(model.path), model.renderer, changed)
    with _loading:
        if key not in _loaded:
            _loaded[key] = build_renderer(model)
        return _loaded[key]


def build_renderer(model: BaseModel) -> ChatRenderer:
    """Read the tokenizer and build the renderer, uncached. Takes up to a second for a large vocabulary."""
    tokenizer = TextTokenizer.load(model.path, name=model.hub_id or model.id)
    name = resolve(model, tokenizer)
    renderer: Any = HermesRenderer(tokenizer) if name == HERMES else _family(name, tokenizer)
    if name != HERMES:
        _choose_reading(renderer, name, tokenizer)
    return FamilyRenderer(renderer, tokenizer, call_end=CALL_CLOSE if name in XML_CALLS else None)


def resolve(model: BaseModel, tokenizer: TextTokenizer) -> str:
    """The concrete renderer name behind `model.renderer`. Raises NoRenderer."""
    if model.renderer != "auto":
        return model.renderer
    if model.hub_id in MODEL_RENDERER_MAP:
        return str(MODEL_RENDERER_MAP[model.hub_id])
    speaks_chatml = all(tokenizer.convert_tokens_to_ids(token) is not None for token in ("<|im_start|>", "<|im_end|>"))
    if speaks_chatml and "tools" not in tokenizer.chat_template:
        return HERMES
    why = "its template has a tool format of its own" if speaks_chatml else "it does not use ChatML tokens"
    raise NoRenderer(
        f"no renderer is known for {model.hub_id or model.id!r} and {why}; register it with --renderer, one of: "
        + ", ".join(renderer_names())
    )


@cache
def renderer_names() -> tuple[str, ...]:
    """What an operator may choose. Multimodal families are left out: their images would need a processor."""
    multimodal = {MODEL_RENDERER_MAP[hub_id] for hub_id in MULTIMODAL_MODELS if hub_id in MODEL_RENDERER_MAP}
    return (HERMES, *sorted({*MODEL_RENDERER_MAP.values()} - (multimodal - XML_CALLS)))


def _family(name: str, tokenizer: TextTokenizer) -> Renderer:
    if name == "default":
        raise NoRenderer("the renderer `default` needs transformers and cannot extend a turn; choose another one")
    try:
        config = config_from_name(name)
    except (KeyError, ValueError) as error:
        raise NoRenderer(f"unknown renderer {name!r}; one of: {', '.join(renderer_names())}") from error
    # Some families look their control tokens up by encoding them; `_choose_reading` turns this off again.
    tokenizer.read_control_tokens(True)
    try:
        return create_renderer(tokenizer, config)
    except Exception as error:  # the families fail in their own ways; a missing token is an AssertionError in most
        raise NoRenderer(
            f"the renderer {name!r} does not fit the tokenizer of {tokenizer.name_or_path}: {error}"
        ) from error


def _choose_reading(renderer: Renderer, name: str, tokenizer: TextTokenizer) -> None:
    """Keep text inert if this format writes its control tokens by id; if it spells them, it must be read as it is."""
    rendered = {}
    for reads in (True, False):
        tokenizer.read_control_tokens(reads)
        rendered[reads] = renderer.render_ids(_PROBE, tools=_PROBE_TOOLS, add_generation_prompt=True)
    if rendered[True] != rendered[False]:
        logger.warning("renderer %s spells control tokens as text: messages may contain them too", name)
        tokenizer.read_control_tokens(True)
