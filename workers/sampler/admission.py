"""What a server must show before it gets a row: that it serves the base model, samples, scores and takes adapters.

Does not cover: adapters, whose every version is proved when it is published (`workers.sampler.proof`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from app.net.clients import HttpClient
from app.net.endpoint import show_url
from app.samplers.client import CompletionRequest, SamplerClient
from app.samplers.errors import ModelNotServed, SamplerError

# The first request compiles and allocates: 13 s on a CPU, and an engine that cannot compute the model dies of it
# (vLLM 0.32 is healthy with a head size that its attention then refuses).
WARM_UP_S = 180.0
WARM_UP_IDS = tuple(range(1, 17)) * 4
BUILT_IN = "hone-builtin"
NOBODY = "nobody-a0-v0"  # an adapter that no job publishes


@dataclass(frozen=True)
class Admitted:
    """For the sampler's row: `engine`, `version`, `dtype`, `max_model_len` and what the server says of itself."""

    info: dict[str, Any]


class NotAdmitted(Exception):
    """The server cannot be used; `another` is what it serves instead, when that is the reason."""

    def __init__(self, reason: str, another: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.another = another


async def admit(http: HttpClient, url: str, base_model: str, *, dtype: str | None, context: int) -> Admitted:
    """Ask, sample and score once. `dtype`: what it was started with; None: its own word. Raises `NotAdmitted`.

    `context`: the longest prompt and completion that will be asked for.
    """
    client = SamplerClient(http, url)
    try:
        served = {model.id: model for model in await client.models() if model.parent is None}
        if base_model not in served:
            names = tuple(sorted(served))
            raise NotAdmitted(f"{show_url(url)} serves {', '.join(names) or 'nothing'}", names)
        length = served[base_model].max_model_len
        if length is not None and length < context:
            raise NotAdmitted(
                f"{show_url(url)} serves {base_model} up to {length} tokens, {context} are needed: "
                "raise its --max-model-len or lower HONE_SAMPLER_MAX_MODEL_LEN"
            )
        about = await client.version()
        await client.complete(
            CompletionRequest(base_model, WARM_UP_IDS, 2, timeout_s=WARM_UP_S, temperature=0.0, request_id="warm-up")
        )
        await client.score(base_model, WARM_UP_IDS)
        await _has_adapter_routes(client)
    except SamplerError as error:
        raise NotAdmitted(f"it is healthy, but its first requests failed: {error}") from error
    engine = "builtin" if about.get("version") == BUILT_IN else "vllm"
    known = dtype or about.get("dtype")
    info = {**about, "engine": engine, "dtype": known or "bfloat16", "max_model_len": length}
    return Admitted(info if known else {**info, "dtype_assumed": True})


async def _has_adapter_routes(client: SamplerClient) -> None:
    """A vLLM that was started without them answers 404 in the shape of an unknown path. Raises `NotAdmitted`."""
    try:
        await client.unload_adapter(NOBODY)
    except ModelNotServed as error:
        if "'detail'" in str(error):
            fix = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            raise NotAdmitted(f"{show_url(client.base_url)} takes no adapters: {fix}") from error
