"""Make a version the served one: check its files, load it into every sampler, prove it there; only then is it used.

Does not cover: writing the adapter (the trainer), the gates (`workers.sampler.proof`), where it is loaded
(`workers.sampler.policy`). A name and a path are never used twice, so a second try is a copy under a name of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.net.endpoint import show_url
from app.samplers.service import Adapter
from workers.messages import Published
from workers.sampler.policy import ServedPolicy
from workers.sampler.proof import Unproved
from workers.sampler.proof.canary import Canary
from workers.sampler.proof.evidence import Proof, Seen, Trained, look
from workers.sampler.proof.files import AdapterFiles, BrokenAdapter
from workers.sampler.proof.gates import Scores, Taken
from workers.sampler.station import Station
from workers.setup import JobFailure

log = logging.getLogger("hone.publication")

LOOKS = 2  # at one loaded adapter, before it is given up
COPIES = 1  # fresh directories under fresh names that are tried after that
COPY_PAUSE_S = 1.0


class PublicationUnproved(JobFailure):
    """No sampler could be shown to serve this version; `detail` has the figures. The job should pause, not fail."""

    def __init__(self, message: str, detail: Mapping[str, Any]) -> None:
        super().__init__("policy_mismatch", message, None, detail)


@dataclass(frozen=True)
class Publication:
    """A version that may be used. `refused`: samplers that do not serve it, with the reason; worth a warning."""

    version: int
    name: str
    path: str
    proofs: Sequence[Proof]
    refused: Mapping[str, str]
    copies: int
    seconds: Mapping[str, float]  # validate, load, quiet, canary, total

    @property
    def unresolved(self) -> str | None:
        """What could not be proved and why, as one sentence; None when every gate had something to say."""
        return next((proof.unresolved for proof in self.proofs if proof.unresolved), None)

    @property
    def verdicts(self) -> dict[str, str]:
        """The worst sampler's, by gate: what to compare when an event is wanted only on a change."""
        gates = self._worst.as_dict()
        return {gate: gates[gate]["verdict"] for gate in "abc"}

    @property
    def _worst(self) -> Proof:
        return max(self.proofs, key=lambda proof: proof.gate_a.mean_abs)

    def as_dict(self) -> dict[str, Any]:
        """For the metrics event: `gates` are those of the sampler that is farthest from the trainer."""
        return {
            "version": self.version,
            "seconds": {name: round(value, 4) for name, value in self.seconds.items()},
            "gates": self._worst.as_dict(),
            "samplers": len(self.proofs),
            "refused": dict(self.refused),
            "copies": self.copies,
            "unresolved": self.unresolved,
        }


class Publisher:
    """One per run; it is the policy's prover from then on, also for samplers that come later.

    `dtypes`: compute types of sampler and trainer, which decide what the proof can resolve; a sampler that states its
    own is believed. `files`: what a version's directory must hold. `memory`: a file that keeps the trainer's scores of
    version 0 for later attempts, which start above it and would have nothing to calibrate by.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        canary: Sequence[Sequence[int]],
        dtypes: tuple[str, str],
        *,
        files: AdapterFiles | None = None,
        memory: Path | None = None,
    ) -> None:
        self._policy = policy
        self._canary = Canary(canary)
        self._dtypes = dtypes
        self._files = files
        self._memory = memory
        self._key = hashlib.sha256(json.dumps([list(map(list, canary)), dtypes[1]]).encode()).hexdigest()
        self._trained = Trained()
        self._seen: dict[tuple[str, float], Seen] = {}
        self._proofs: dict[tuple[str, str], Proof] = {}  # sampler id, adapter name
        policy.prover = self._prove

    async def publish(self, adapter: Published) -> Publication:
        """Check, load and prove. Raises `PublicationUnproved`, and `SamplerError` when no sampler comes in time."""
        began = time.monotonic()
        version = adapter.version
        await self._check(adapter)
        await self._note(adapter)
        validated = time.monotonic()
        served, copies = Adapter(adapter.name, adapter.path), 0
        while True:
            try:
                await self._policy.publish(version, served)
                break
            except Unproved as error:
                log.error("%s: %s", served.name, error)
                if copies == COPIES:
                    await self._policy.retire(version)
                    self._trained.forget(version)
                    raise PublicationUnproved(
                        f"Version {version} was published {copies + 1} times and is not used: {error}",
                        {"version": version, "sampler": error.sampler, "reason": error.reason, **error.figures},
                    ) from error
                copies += 1
                served = await self._again(adapter, served, copies)
        self._trained.keep(self._policy.versions())
        found = self._publication(adapter.version, served, copies, began, validated)
        log.info("published %s: %s", served.name, found.as_dict())
        return found

    # --- the proof on one sampler -----------------------------------------------------------------------------------

    async def _prove(self, station: Station, version: int, adapter: Adapter) -> None:
        """The policy's prover."""
        self._trained.names[version] = adapter.name
        seen = self._seen.setdefault(_life(station), Seen())
        dtypes = (str(station.sampler.info.get("dtype", self._dtypes[0])), self._dtypes[1])
        before: Taken | None = None
        for _ in range(LOOKS):
            proof = await look(station, version, self._canary, self._trained, seen, dtypes, self._policy.base_model)
            taken = seen.prints.get(adapter.name)
            if before is not None and before == taken:
                proof = proof.steady()
            if not proof.failures:
                break
            log.warning("%s at %s: %s", adapter.name, show_url(station.sampler.url), "; ".join(proof.failures))
            before = seen.prints.pop(adapter.name, None)
        else:
            raise Unproved("; ".join(proof.failures), sampler=station.sampler.url, figures={"gates": proof.as_dict()})
        self._proofs[(station.sampler.id, adapter.name)] = proof

    # --- before and after -------------------------------------------------------------------------------------------

    async def _check(self, adapter: Published) -> None:
        if self._files is None:
            return
        try:
            await asyncio.to_thread(self._files.check, Path(adapter.path), adapter.sha256)
        except BrokenAdapter as error:
            raise PublicationUnproved(
                f"Version {adapter.version} was not loaded: {error}", {"version": adapter.version, "reason": str(error)}
            ) from error

    async def _note(self, adapter: Published) -> None:
        """The trainer's own scores; version 0's are kept for later attempts."""
        scores: Scores = json.loads(await asyncio.to_thread(Path(adapter.canary_log_probs).read_text))
        if adapter.version == 0 and self._memory is not None:
            await asyncio.to_thread(_write, self._memory, {"canary": self._key, "scores": scores})
        elif 0 not in self._trained.scores and self._memory is not None:
            kept = await asyncio.to_thread(_read, self._memory)
            if kept.get("canary") == self._key:
                # Version 0 is not served in this attempt; the base is, and equals it.
                self._trained.scores[0], self._trained.names[0] = kept["scores"], self._policy.base_model
        self._trained.scores[adapter.version] = scores
        self._trained.names[adapter.version] = adapter.name

    async def _again(self, adapter: Published, failed: Adapter, copy: int) -> Adapter:
        """The same files under a new name and path; the failed ones go."""
        fresh = Adapter(f"{adapter.name}-r{copy}", f"{adapter.path}-r{copy}")
        await asyncio.sleep(COPY_PAUSE_S)
        await asyncio.to_thread(shutil.copytree, failed.path, fresh.path)
        await self._policy.retire(adapter.version)
        await self._check(replace(adapter, path=fresh.path))
        return fresh

    def _publication(self, version: int, served: Adapter, copies: int, began: float, validated: float) -> Publication:
        proofs = [
            self._proofs[(station.sampler.id, served.name)]
            for station in self._policy.stations(version)
            if (station.sampler.id, served.name) in self._proofs
        ]
        names = {served.name, *self._trained.names.values()}
        self._proofs = {key: proof for key, proof in self._proofs.items() if key[1] in names}
        ended = time.monotonic()
        seconds = {
            phase: max((proof.seconds.get(phase, 0.0) for proof in proofs), default=0.0)
            for phase in ("quiet", "canary")
        }
        return Publication(
            version=version,
            name=served.name,
            path=served.path,
            proofs=proofs,
            refused={sampler: error.reason for sampler, error in self._policy.refusals(version).items()},
            copies=copies,
            seconds={
                "validate": validated - began,
                "load": max(0.0, ended - validated - sum(seconds.values())),
                **seconds,
                "total": ended - began,
            },
        )


def _life(station: Station) -> tuple[str, float]:
    """A sampler from one start to the next."""
    return station.sampler.id, station.sampler.started_at


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any]:
    """Empty when nothing was kept or it cannot be read: then the fixed limits hold."""
    try:
        kept = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}
