"""Chat completions and responses: render the messages, have the sampler continue the token ids, read what it wrote.

Does not cover: the wire (`schemas`, `answer`, `stream`). Rendering and parsing are those of the rollouts, so that a
model is served in the format it was trained in; the sampler never sees text.
"""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import dataclass

from app.core.errors import InvalidRequest, ServiceError, Unavailable
from app.core.ids import new_id
from app.inference.capacity import Gate
from app.inference.request import Ask
from app.inference.resolution import Resolver, Target
from app.inference.turns import Choice, read_turn
from app.rendering.protocol import MessageNotRenderable
from app.samplers.client import Completion, CompletionRequest
from app.samplers.errors import (
    AdapterNotVisible,
    AdapterRefused,
    ModelNotServed,
    SamplerError,
    SamplerRejected,
    SamplerUnavailable,
)
from app.samplers.service import Lease, NoSampler, Samplers

log = logging.getLogger(__name__)

DEADLINE_S = 600.0  # the SDK's own patience
DEFAULT_MAX_TOKENS = 1024
SAMPLER_WAIT_S = 2.0  # bridges the restart of an engine that was warm; a cold start is the client's to wait for
RETRY_AFTER_S = 5.0
ATTEMPTS = 2
IN_FLIGHT = 256
QUEUE = 1024


class SamplingFailed(ServiceError):
    """The sampler refused or garbled a request that was correct: our fault or the adapter's, never the caller's."""


class DeadlineExceeded(ServiceError):
    """The time a request may take is over. Not an `Unavailable`: the SDK would wait as long twice more."""

    status = 504
    default_code = "deadline_exceeded"


class Aborted(Exception):
    """The engine gave a request up half way; what it had sampled is thrown away."""


@dataclass(frozen=True)
class Prompt:
    """A request ready to be sampled: all that can be wrong with it has been checked."""

    ask: Ask
    target: Target
    ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """`policy`: the name of the weights that answered; `sampler`: the id of the server they were in."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    cached_tokens: int
    policy: str
    sampler: str


class ChatService:
    """One per API process."""

    def __init__(
        self,
        resolver: Resolver,
        samplers: Samplers,
        *,
        max_model_len: int,
        gate: Gate | None = None,
        deadline_s: float = DEADLINE_S,
        sampler_wait_s: float = SAMPLER_WAIT_S,
    ) -> None:
        self._resolver = resolver
        self._samplers = samplers
        self._max_model_len = max_model_len
        self._gate = gate or Gate(IN_FLIGHT, QUEUE)
        self._deadline_s = deadline_s
        self._sampler_wait_s = sampler_wait_s
        self._holder = f"chat-{os.getpid()}-{new_id('')[:6]}"

    async def answer(self, project_id: str, ask: Ask) -> Answer:
        """Raises NotFound, InvalidRequest, Unavailable (503: no sampler, overload, deadline) or SamplingFailed."""
        try:
            async with asyncio.timeout(self._deadline_s), self._gate.enter():
                prompt = await self._prepare(project_id, ask)
                return await self._sample(prompt)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"No answer within {self._deadline_s:.0f} s; ask for fewer tokens or choices."
            ) from error

    async def _prepare(self, project_id: str, ask: Ask) -> Prompt:
        target = await self._resolver.resolve(project_id, ask.model)
        try:
            ids = await asyncio.to_thread(target.renderer.prompt, ask.messages, ask.tools)
        except MessageNotRenderable as error:
            raise InvalidRequest(error.reason, param=ask.field(error.param)) from error
        context = min(target.base.context, self._max_model_len)
        room = context - len(ids)
        if room < 1:
            raise _too_long(context, len(ids), ask)
        return Prompt(ask, target, ids, min(ask.max_tokens or DEFAULT_MAX_TOKENS, room))

    async def _sample(self, prompt: Prompt) -> Answer:
        """A sampler that fails is tried once more: by then it is another one, or has the adapter loaded anew."""
        target, failure = prompt.target, ""
        failed: set[str] = set()
        for _ in range(ATTEMPTS):
            try:
                async with self._samplers.acquire(
                    target.base.id,
                    target.adapter,
                    self._holder,
                    wait_s=self._sampler_wait_s,
                    avoid=frozenset(failed),
                ) as lease:
                    failed.add(lease.sampler.id)
                    return await self._read(prompt, await self._complete_all(lease, prompt), lease)
            except NoSampler as error:  # the keeper has been asked for one
                raise Unavailable(error.reason, retry_after_s=error.retry_after_s, code="no_sampler") from error
            except (SamplerUnavailable, ModelNotServed, Aborted) as error:
                failure = _reason(error)
                _tell_operator(target, error)
            except SamplerRejected as error:
                raise _rejected(error, prompt.ask) from error
            except AdapterNotVisible as error:
                _tell_operator(target, error)
                raise SamplingFailed(
                    "The sampler does not find the files of this model; the log of the API says where it looked.",
                    code="adapter_not_visible",
                ) from error
            except SamplerError as error:
                _tell_operator(target, error)
                raise SamplingFailed(
                    f"The sampler did not answer as agreed: {_reason(error)}", code="sampler_failed"
                ) from error
        raise Unavailable(
            f"The sampler failed twice: {failure}", retry_after_s=RETRY_AFTER_S, code="sampler_unavailable"
        )

    async def _complete_all(self, lease: Lease, prompt: Prompt) -> list[Completion]:
        """Each choice is a request of its own (the engine shares the prefix); one failure ends its siblings."""
        tasks = [
            asyncio.ensure_future(lease.client.complete(self._request(lease, prompt, choice)))
            for choice in range(prompt.ask.n)
        ]
        try:
            completions = await asyncio.gather(*tasks)
        except ModelNotServed:
            await self._samplers.lost_adapter(lease.sampler, lease.model)
            raise
        except SamplerUnavailable:
            self._samplers.forget(lease.sampler)
            raise
        finally:
            for task in tasks:
                task.cancel()
        if any(completion.finish_reason == "abort" for completion in completions):
            raise Aborted("the engine aborted the request")
        return completions

    def _request(self, lease: Lease, prompt: Prompt, choice: int) -> CompletionRequest:
        ask, renderer = prompt.ask, prompt.target.renderer
        ends = renderer.stop_strings(parallel=ask.parallel or ask.tools is None)
        return CompletionRequest(
            model=lease.model,
            prompt_ids=prompt.ids,
            max_tokens=prompt.max_tokens,
            temperature=ask.sampling.temperature,
            top_p=ask.sampling.top_p,
            top_k=ask.sampling.top_k,
            min_p=ask.sampling.min_p,
            repetition_penalty=ask.sampling.repetition_penalty,
            # Best effort, as in OpenAI's API: an engine that a seed would end gets none.
            seed=ask.sampling.seed_of(choice) if lease.sampler.info.get("seeds", True) else None,
            stop_token_ids=renderer.stop_token_ids,
            stop=(*ask.stop, *ends),
            timeout_s=self._deadline_s,  # the whole request has this one; whichever is sooner
        )

    async def _read(self, prompt: Prompt, completions: list[Completion], lease: Lease) -> Answer:
        choices = await asyncio.to_thread(
            lambda: [read_turn(prompt.target.renderer, prompt.ask, prompt.ids, each) for each in completions]
        )
        return Answer(
            choices=tuple(choices),
            prompt_tokens=len(prompt.ids),
            cached_tokens=completions[0].cached_tokens or 0,
            policy=lease.model,
            sampler=lease.sampler.id,
        )


def _tell_operator(target: Target, error: Exception) -> None:
    """With the addresses and paths that are not for whoever asked."""
    model = target.base.id if target.adapter is None else target.adapter.name
    log.warning("a sampler failed a chat request", extra={"ctx": {"model": model, "error": str(error)}})


def _reason(error: SamplerError | Aborted) -> str:
    """For whoever asked: no address of a server, no path of ours."""
    if isinstance(error, AdapterRefused):
        return "it cannot load the files of this model"
    return error.reason if isinstance(error, SamplerError) else str(error)


def _too_long(context: int, tokens: int, ask: Ask) -> InvalidRequest:
    return InvalidRequest(
        f"This model's context is {context} tokens and the messages are {tokens}; shorten them.",
        param=ask.field("messages"),
        code="context_length_exceeded",
    )


def _rejected(error: SamplerRejected, ask: Ask) -> ServiceError:
    """The sampler's 400 is the caller's where it names a field of the caller; else it is ours, or NaN weights."""
    if error.param == "input_tokens":
        return InvalidRequest(error.reason, param=ask.field("messages"), code="context_length_exceeded")
    if error.param in ("max_tokens", "stop", "seed", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        return InvalidRequest(error.reason, param=error.param)
    return SamplingFailed(f"The sampler refused the request: {error.reason}", code="sampler_rejected")
