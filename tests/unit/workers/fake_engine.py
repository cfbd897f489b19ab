"""A sampler in memory: the client of one, with vLLM's answers for adapters, and a `Samplers` that hands it out.

Does not cover: the protocol on the wire (`tests/contract/sampler`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from app.core.settings import Settings
from app.db.engine import Database, now
from app.db.tables import DEFAULT_PROJECT, Sampler
from app.samplers.client import Completion, CompletionRequest, ServedModel
from app.samplers.errors import AdapterRefused, ModelNotServed, SamplerRejected, SamplerUnavailable
from app.samplers.service import LiveSampler, Samplers


class FakeEngine:
    """`slots` adapters at most; `dead` answers nothing; `before` may answer a completion, `scores` scores."""

    def __init__(self, url: str, slots: int = 8) -> None:
        self.url = url
        self.slots = slots
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []
        self.requests: list[CompletionRequest] = []
        self.dead = False
        self.before: Callable[[CompletionRequest], Awaitable[Completion | None]] | None = None
        self.scores: Callable[[str, Sequence[int]], Awaitable[Sequence[float]]] | None = None
        self.hidden: set[str] = set()  # paths that this host does not have
        self.refuses = 0  # loads to come that a healthy engine refuses
        self.others = 0  # requests of somebody else in flight
        self.generated = 0  # tokens, as its counter has them

    def _alive(self) -> None:
        if self.dead:
            raise SamplerUnavailable("connection refused", url=self.url)

    async def health(self) -> bool:
        return not self.dead

    async def models(self) -> list[ServedModel]:
        self._alive()
        return [ServedModel(name, path, None, None) for name, path in self.adapters.items()]

    async def load_adapter(self, name: str, path: str) -> None:
        self._alive()
        self.calls.append(("load", name))
        if name in self.adapters:
            raise SamplerRejected(f"{name} is loaded", url=self.url, param="lora_name")
        if len(self.adapters) >= self.slots:
            raise SamplerRejected("no free slot", url=self.url, param=None)
        if self.refuses:
            self.refuses -= 1
            raise AdapterRefused("not enough memory", url=self.url, status=500)
        if path in self.hidden:
            raise ModelNotServed("no adapter found", url=self.url)
        self.adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        self._alive()
        self.calls.append(("unload", name))
        if self.adapters.pop(name, None) is None:
            raise ModelNotServed(f"{name} is not loaded", url=self.url)

    async def complete(self, request: CompletionRequest) -> Completion:
        self.requests.append(request)
        self._alive()
        if self.before is not None and (answer := await self.before(request)) is not None:
            return answer
        if request.model not in self.adapters:
            raise ModelNotServed(f"{request.model} is not loaded", url=self.url)
        return answer_of(request)

    async def score(self, model: str, ids: Sequence[int]) -> list[float]:
        self._alive()
        self.generated += 1
        if self.scores is not None:
            return list(await self.scores(model, ids))
        return [-1.0] * (len(ids) - 1)

    async def metrics(self) -> str:
        self._alive()
        figures = {"num_requests_running": self.others, "num_requests_waiting": 0}
        figures["generation_tokens_total"] = self.generated
        return "".join(f"vllm:{name} {value}\n" for name, value in figures.items())


def answer_of(request: CompletionRequest, finish: Any = "stop") -> Completion:
    return Completion(request.model, (5, 0), (-0.5, -0.25), "x", finish, None, len(request.prompt_ids), None)


class FakeSamplers(Samplers):
    """The real service over real rows; only the client is ours."""

    def __init__(self, database: Database, settings: Settings) -> None:
        super().__init__(database, settings)
        self.engines: dict[str, FakeEngine] = {}

    def client(self, sampler: LiveSampler) -> Any:
        return self.engines[sampler.url]

    async def add(
        self, name: str, *, slots: int = 8, age_s: float = 0.0, base_model: str = "tiny", root: str = ""
    ) -> FakeEngine:
        """Register a running sampler whose last heartbeat is `age_s` old."""
        engine = self.engines[f"http://{name}"] = FakeEngine(f"http://{name}", slots)
        async with self._database.begin() as session:
            session.add(
                Sampler(
                    id=f"sampler-{name}",
                    project_id=DEFAULT_PROJECT,
                    base_model=base_model,
                    url=engine.url,
                    host="here",
                    adapter_root=root,
                    max_loras=slots,
                    info={},
                    started_at=now(),
                    heartbeat=now() - age_s,
                )
            )
        return engine
