"""A version is proved on every sampler before anything is sampled from it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.core.settings import Settings
from app.db.engine import Database
from app.samplers.errors import SamplerMisbehaved
from tests.unit.workers.adapter_files import expected, write_adapter, write_base
from tests.unit.workers.fake_engine import FakeEngine, FakeSamplers
from workers import publication as publication_module
from workers.messages import Published
from workers.publication import Publication, PublicationUnproved, Publisher
from workers.rollouts.setting import TurnRequest
from workers.sampler import policy as policy_module
from workers.sampler import station as station_module
from workers.sampler.policy import ServedPolicy
from workers.sampler.proof.gates import Verdict

CANARY = [list(range(120)), list(range(80))]
JOB = "ftjob-1-a1"

Serve = Callable[[str], Sequence[Sequence[float]]]


def weights(version: float) -> list[list[float]]:
    """The exact scores of a version; each step moves every token by about 0.02."""
    chance, step = random.Random(7), random.Random(8)
    return [[-chance.expovariate(0.5) + version * step.gauss(0, 0.02) for _ in ids[1:]] for ids in CANARY]


def version_of(name: str) -> int:
    return int(name.split("-v")[1].split("-")[0]) if "-v" in name else 0


class Stage:
    """One run's publisher over samplers in memory; `serve` decides what an engine answers under a name."""

    def __init__(self, root: Path, samplers: FakeSamplers, policy: ServedPolicy) -> None:
        self.root, self.samplers, self.policy = root, samplers, policy
        self.dtype = "float32"
        self.memory: Path | None = None

    async def engine(self, name: str = "a", **fields: Any) -> FakeEngine:
        engine = await self.samplers.add(name, **fields)
        self.serve(engine, lambda model: weights(version_of(model)))
        return engine

    def serve(self, engine: FakeEngine, what: Serve) -> None:
        async def scores(model: str, ids: Sequence[int]) -> Sequence[float]:
            assert model == "tiny" or model in engine.adapters
            return what(model)[CANARY.index(list(ids))]

        engine.scores = scores

    def publisher(self) -> Publisher:
        files = expected(write_base(self.root / "base"))
        return Publisher(self.policy, CANARY, (self.dtype, self.dtype), files=files, memory=self.memory)

    def trained(self, version: int, scores: Sequence[Sequence[float]] | None = None) -> Published:
        """As the trainer hands it over."""
        directory = self.root / "adapters" / f"{JOB}-v{version}"
        sha256 = write_adapter(directory, fill=version / 10)
        file = directory / "canary.json"
        file.write_text(json.dumps(scores or weights(version)))
        return Published(version, directory.name, str(directory), sha256, str(file))


@pytest.fixture
async def stage(settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    for module, name in ((policy_module, "RETRY_PAUSE_S"), (publication_module, "COPY_PAUSE_S")):
        monkeypatch.setattr(module, name, 0.01)
    samplers = FakeSamplers(database, settings)
    yield Stage(settings.root, samplers, ServedPolicy(samplers, database, "tiny", JOB))
    await samplers.close()


def verdicts(found: Publication) -> tuple[str, ...]:
    assert {gate: found.as_dict()["gates"][gate]["verdict"] for gate in "abc"} == found.verdicts
    return tuple(found.verdicts.values())


async def test_two_versions_are_proved_by_all_three_gates(stage: Stage) -> None:
    await stage.engine()
    publisher = stage.publisher()
    first = await publisher.publish(stage.trained(0))
    assert verdicts(first) == ("holds", "not_taken", "not_taken")
    assert first.proofs[0].base is not None
    second = await publisher.publish(stage.trained(1))
    assert verdicts(second) == ("holds", "holds", "holds")
    assert second.unresolved is None
    assert {"validate", "load", "quiet", "canary", "total"} == set(second.seconds)
    json.dumps(second.as_dict(), allow_nan=False)


async def test_broken_files_are_never_loaded(stage: Stage) -> None:
    engine = await stage.engine()
    adapter = stage.trained(0)
    Path(adapter.path, "adapter_model.safetensors").write_bytes(b"something else")
    with pytest.raises(PublicationUnproved, match="sha256") as caught:
        await stage.publisher().publish(adapter)
    assert engine.calls == []
    assert caught.value.code == "policy_mismatch"


async def test_a_version_zero_that_is_not_the_base_is_refused(stage: Stage) -> None:
    engine = await stage.engine()
    stage.serve(engine, lambda model: weights(0 if model == "tiny" else 1))
    with pytest.raises(PublicationUnproved, match="does not equal the base"):
        await stage.publisher().publish(stage.trained(0, weights(1)))


WRONG: dict[str, Callable[[int], float]] = {
    "the version before": lambda version: version - 1,
    "the base": lambda version: 0,
    "another scale": lambda version: 2 * version,
    "something broken": lambda version: math.nan,
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_another_policy_behind_the_name_is_refused_with_figures(stage: Stage, wrong: str) -> None:
    engine = await stage.engine()
    publisher = stage.publisher()
    for version in range(3):
        await publisher.publish(stage.trained(version))
    of = WRONG[wrong]
    stage.serve(engine, lambda model: weights(of(3) if version_of(model) == 3 else version_of(model)))
    with pytest.raises(PublicationUnproved, match="gate") as caught:
        await publisher.publish(stage.trained(3))
    assert caught.value.detail is not None
    assert caught.value.detail["gates"]["a"]["verdict"] == "fails"
    json.dumps(caught.value.detail, allow_nan=False)
    assert stage.policy.versions() == [0, 1, 2]
    assert set(engine.adapters) == {f"{JOB}-v{version}" for version in range(3)}  # both tries were taken back


async def test_the_version_before_is_found_below_the_limits_of_gate_a(stage: Stage) -> None:
    """In half precision a step of 0.02 a token is far within the band; the projection and the fingerprint see it."""
    stage.dtype = "bfloat16"
    engine = await stage.engine()
    publisher = stage.publisher()
    await publisher.publish(stage.trained(0))
    await publisher.publish(stage.trained(1))
    stage.serve(engine, lambda model: weights(min(1, version_of(model))))
    with pytest.raises(PublicationUnproved, match="gate B") as caught:
        await publisher.publish(stage.trained(2))
    assert caught.value.detail is not None
    gates = caught.value.detail["gates"]
    assert [gates[gate]["verdict"] for gate in "abc"] == ["holds", "fails", "fails"]
    assert gates["c"]["same_as"] == f"{JOB}-v1"


def rounded_back(model: str) -> list[list[float]]:
    """Version 2 as a sampler may answer whose precision swallows most of its step, the same way every time."""
    return weights(1.15 if version_of(model) == 2 else version_of(model))


async def test_a_step_that_precision_swallows_is_not_taken_for_the_version_before(stage: Stage) -> None:
    """The engine repeats itself to the bit and does not answer as it does for version 1: that one is not served."""
    stage.dtype = "bfloat16"
    engine = await stage.engine()
    stage.serve(engine, rounded_back)
    publisher = stage.publisher()
    for version in range(3):
        found = await publisher.publish(stage.trained(version))
    assert verdicts(found) == ("holds", "not_resolvable", "holds")
    assert "could not be told from version 1: projection -0.35" in (found.unresolved or "")
    assert "it was told from version 0" in (found.unresolved or "")


async def test_an_engine_that_never_repeats_itself_has_no_such_excuse(stage: Stage) -> None:
    stage.dtype = "bfloat16"
    engine, chance = await stage.engine(), random.Random(1)
    stage.serve(engine, lambda model: [[v + chance.gauss(0, 1e-6) for v in row] for row in rounded_back(model)])
    publisher = stage.publisher()
    for version in range(2):
        await publisher.publish(stage.trained(version))
    with pytest.raises(PublicationUnproved, match="gate B"):
        await publisher.publish(stage.trained(2))


async def test_a_wrong_scale_has_no_such_excuse(stage: Stage) -> None:
    stage.dtype = "bfloat16"
    engine = await stage.engine()
    publisher = stage.publisher()
    for version in range(2):
        await publisher.publish(stage.trained(version))
    stage.serve(engine, lambda model: weights(0.3 if version_of(model) == 2 else version_of(model)))
    with pytest.raises(PublicationUnproved, match="gate B"):
        await publisher.publish(stage.trained(2))


async def test_a_step_below_the_noise_is_reported_and_neither_passed_nor_failed(stage: Stage) -> None:
    stage.dtype = "bfloat16"
    engine = await stage.engine()

    def noisy(model: str) -> Sequence[Sequence[float]]:
        chance = random.Random(model)
        return [[value + chance.gauss(0, 0.05) for value in row] for row in weights(version_of(model) * 1e-3)]

    stage.serve(engine, noisy)
    publisher = stage.publisher()
    for version in range(3):
        found = await publisher.publish(stage.trained(version, weights(version * 1e-3)))
    assert verdicts(found) == ("holds", "not_resolvable", "holds")
    assert found.unresolved is not None
    assert "could not be told from version 1" in found.unresolved
    assert found.proofs[0].older is not None
    assert found.proofs[0].older.against == 0


async def test_where_the_step_is_too_small_an_older_version_is_ruled_out(stage: Stage) -> None:
    stage.dtype = "bfloat16"
    engine = await stage.engine()
    at = [0.0, 4.0, 4.001]  # a long way, then a tiny step

    def noisy(model: str) -> Sequence[Sequence[float]]:
        chance = random.Random(model)
        return [[value + chance.gauss(0, 0.02) for value in row] for row in weights(at[version_of(model)])]

    stage.serve(engine, noisy)
    publisher = stage.publisher()
    for version in range(3):
        found = await publisher.publish(stage.trained(version, weights(at[version])))
    older = found.proofs[0].older
    assert older is not None
    assert (older.against, older.verdict) == (0, Verdict.HOLDS)
    assert "it was told from version 0" in (found.unresolved or "")


async def test_weights_that_give_no_numbers_are_the_engines_fault_and_refused(stage: Stage) -> None:
    engine = await stage.engine()
    publisher = stage.publisher()
    await publisher.publish(stage.trained(0))

    async def nan(model: str, ids: Sequence[int]) -> Sequence[float]:
        if version_of(model) == 1:
            raise SamplerMisbehaved("Out of range float values are not JSON compliant", url=engine.url)
        return weights(version_of(model))[CANARY.index(list(ids))]

    engine.scores = nan
    with pytest.raises(PublicationUnproved, match="gives no scores"):
        await publisher.publish(stage.trained(1))


async def test_a_second_try_is_a_copy_under_a_new_name_and_path(stage: Stage) -> None:
    engine = await stage.engine()
    publisher = stage.publisher()
    await publisher.publish(stage.trained(0))
    stage.serve(engine, lambda model: weights(0 if model == f"{JOB}-v1" else version_of(model)))
    found = await publisher.publish(stage.trained(1))
    assert (found.name, found.copies) == (f"{JOB}-v1-r1", 1)
    assert engine.adapters[found.name] == found.path == stage.policy.path(1)
    assert not Path(f"{found.path}".removesuffix("-r1")).exists()
    loaded = [name for call, name in engine.calls if call == "load"]
    assert len(loaded) == len(set(loaded))


async def test_one_bad_look_is_forgiven(stage: Stage) -> None:
    engine = await stage.engine()
    publisher = stage.publisher()
    await publisher.publish(stage.trained(0))
    looks = iter([0, 0])  # both sequences of the first look at version 1
    stage.serve(engine, lambda model: weights(next(looks, 1) if version_of(model) == 1 else 0))
    assert (await publisher.publish(stage.trained(1))).copies == 0


# --- fingerprints ---------------------------------------------------------------------------------------------------


async def test_with_turns_in_flight_the_fingerprint_is_recorded_as_not_taken(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station_module, "QUIET_WAIT_S", 0.05)
    engine = await stage.engine()
    publisher = stage.publisher()
    await publisher.publish(stage.trained(0))
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def slow(request: Any) -> None:
        asked.set()
        await go_on.wait()

    engine.before = slow
    turn = asyncio.create_task(stage.policy.turn(a_turn(0)))
    await asked.wait()
    busy = await publisher.publish(stage.trained(1))
    assert verdicts(busy) == ("holds", "holds", "not_taken")
    assert "in flight" in busy.as_dict()["gates"]["c"]["reason"]
    go_on.set()
    await turn
    assert verdicts(await publisher.publish(stage.trained(2))) == ("holds", "holds", "holds")  # 1's was made up for


@pytest.mark.parametrize("others", ["before", "between"])
async def test_somebody_elses_requests_spoil_the_fingerprint(stage: Stage, others: str) -> None:
    engine = await stage.engine()
    publisher = stage.publisher()
    await publisher.publish(stage.trained(0))
    if others == "before":
        engine.others = 1

    def busy(model: str) -> Sequence[Sequence[float]]:
        engine.generated += others == "between"
        return weights(version_of(model))

    stage.serve(engine, busy)
    assert verdicts(await publisher.publish(stage.trained(1))) == ("holds", "holds", "not_taken")


# --- several samplers, and later attempts ---------------------------------------------------------------------------


async def test_a_sampler_that_comes_later_proves_every_version_before_it_is_used(stage: Stage) -> None:
    await stage.engine("a")
    publisher = stage.publisher()
    for version in (0, 1):
        await publisher.publish(stage.trained(version))
    late = await stage.engine("b")
    stage.serve(late, lambda model: weights(0))  # it has the base for everything
    await stage.policy._pass()
    assert [station.sampler.id for station in stage.policy.stations(0)] == ["sampler-a", "sampler-b"]
    assert [station.sampler.id for station in stage.policy.stations(1)] == ["sampler-a"]
    assert set(stage.policy.refusals(1)) == {"sampler-b"}


async def test_a_later_version_goes_on_with_the_samplers_that_prove_it(stage: Stage) -> None:
    await stage.engine("a")
    broken = await stage.engine("b")
    publisher = stage.publisher()
    await publisher.publish(stage.trained(0))
    stage.serve(broken, lambda model: weights(0))
    found = await publisher.publish(stage.trained(1))
    assert [proof.sampler for proof in found.proofs] == ["sampler-a"]
    assert "gate" in found.as_dict()["refused"]["sampler-b"]


async def test_before_the_first_rollout_every_sampler_must_see_the_directory(stage: Stage) -> None:
    await stage.engine("a")
    blind = await stage.engine("b", root="/there")
    adapter = stage.trained(0)
    blind.hidden = {f"/there/adapters/{adapter.name}", f"/there/adapters/{adapter.name}-r1"}
    with pytest.raises(PublicationUnproved, match="does not find the adapter directory") as caught:
        await stage.publisher().publish(adapter)
    assert f"/there/adapters/{adapter.name}" in caught.value.message
    assert f"{stage.root}/adapters/{adapter.name}" in caught.value.message


async def test_a_later_attempt_is_calibrated_by_what_the_first_kept(stage: Stage) -> None:
    stage.memory = stage.root / "proof.json"
    engine = await stage.engine()
    await stage.publisher().publish(stage.trained(0))
    again = await stage.publisher().publish(stage.trained(5))
    assert verdicts(again) == ("holds", "holds", "holds")
    assert again.proofs[0].gate_b is not None
    assert again.proofs[0].gate_b.against == 0
    stage.serve(engine, lambda model: weights(0))
    with pytest.raises(PublicationUnproved):
        await stage.publisher().publish(stage.trained(6))


def a_turn(version: int, *, seconds: float = 5.0) -> TurnRequest:
    return TurnRequest(
        version=version,
        prompt_ids=(1, 2),  # type: ignore[arg-type]
        max_tokens=5,
        temperature=1.0,
        stop_token_ids=(0,),
        stop=(),
        request_id="r-0",
        deadline=time.monotonic() + seconds,
    )
