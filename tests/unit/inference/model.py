"""A base model whose tokens are bytes, and a sampler that says what a test tells it: nothing here computes anything.

Does not cover: HTTP (`tests/api/fake_sampler`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from app.models.catalogue import BaseModel
from app.models.register import finish
from app.samplers.client import Completion, CompletionRequest
from app.samplers.service import Adapter, Lease, LiveSampler, NoSampler

CONTEXT = 2048
LOOKUP = {
    "type": "function",
    "function": {"name": "lookup", "parameters": {"type": "object", "properties": {"item": {"type": "string"}}}},
}
CALL = '<tool_call>{"name": "lookup", "arguments": {"item": "hat"}}</tool_call>'


def make_byte_model(directory: Path) -> BaseModel:
    """Register a model with the tokenizer of bytes plus ChatML's control tokens, and no weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").touch()
    card = BaseModel(
        id=directory.name,
        path=directory.resolve(),
        renderer="hermes",
        context=CONTEXT,
        lora_targets=("q_proj",),
        base_learning_rate=1e-3,
        lora_rank=4,
        licence="apache-2.0",
        hub_id=None,
        created=1_795_000_000,
    )
    finish(directory, card)
    return card


def completion(encode: Callable[[str], list[int]], text: str, *, end: int | None = None, **given: Any) -> Completion:
    """What a sampler answers when the model wrote `text` and then the token `end`."""
    ids = encode(text) + ([] if end is None else [end])
    values = {
        "model": "m",
        "token_ids": ids,
        "log_probs": [-0.5] * len(ids),
        "text": text,
        "finish_reason": "stop",
        "stop_reason": None,
        "prompt_tokens": 1,
        "cached_tokens": None,
    }
    return Completion(**{**values, **given})


class FakeClient:
    """Gives the scripted answers in order; an exception is raised, a callable is awaited with the request."""

    def __init__(self, answers: Iterable[Any]) -> None:
        self.requests: list[CompletionRequest] = []
        self.cancelled = 0
        self._answers = iter(answers)

    async def complete(self, request: CompletionRequest) -> Completion:
        self.requests.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        try:
            await asyncio.sleep(0)
            return await answer(request) if callable(answer) else answer
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


class FakeSamplers:
    """One live sampler, or none."""

    def __init__(self, client: FakeClient | None) -> None:
        self._client = client
        self.acquired: list[tuple[str, Adapter | None]] = []
        self.forgotten = 0
        self.sampler = LiveSampler("smp-1", "http://127.0.0.1:1", "m", 4, 0.0)

    @asynccontextmanager
    async def acquire(
        self,
        base_model: str,
        adapter: Adapter | None,
        holder: str,
        *,
        wait_s: float = 0.0,
        avoid: frozenset[str] = frozenset(),
    ) -> AsyncIterator[Lease]:
        self.acquired.append((base_model, adapter))
        if self._client is None:
            raise NoSampler("no sampler is running; one is starting")
        client: Any = self._client
        yield Lease(client, adapter.name if adapter else base_model, self.sampler)

    async def lost_adapter(self, sampler: LiveSampler, name: str) -> None:
        self.forget(sampler)

    def forget(self, sampler: LiveSampler) -> None:
        assert sampler is self.sampler
        self.forgotten += 1
