"""What `hone doctor` says of samplers: the engine and why, its command, its share of the GPUs, the adapter slots.

Does not cover: starting one. The worker side is asked through a process (`workers.sampler.engines`): this room imports
no worker.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from app.cli.findings import DEADLINE_S, Finding, Verdict, quoted
from app.net.endpoint import show_url

if TYPE_CHECKING:
    from app.core.settings import Settings

ASK_S = 60.0
STALENESS = 1  # of a job that says nothing
_SECRET = re.compile(r"-(?:key|token|secret|password)$", re.IGNORECASE)
# What the documents claim of GPU hosts without a figure of ours behind it.
NOT_MEASURED = (
    "vLLM on a GPU: start, speed, memory share", "sampler and trainer on one GPU", "tensor parallelism",
    "several vLLM servers on several GPUs", "FSDP",
)  # fmt: skip


class CannotTell(Exception):
    """The worker side did not say what it would start."""


def sampler(settings: Settings) -> Iterator[Finding]:
    """Engine, command, shares and slots."""
    urls = [part.strip() for part in settings.sampler_urls.split(",") if part.strip()]
    if urls:
        yield from (_elsewhere(url) for url in urls)
        yield slots(settings, settings.sampler_max_lora_rank)
    else:
        try:
            found = describe(settings)
        except CannotTell as error:
            yield Finding("sampler", Verdict.PROBLEM, str(error), "see HONE_SAMPLER_ENGINE in docs/settings.md")
            return
        yield from _local(found)
        yield slots(settings, int(found["max_lora_rank"]))
    yield Finding("claims", Verdict.OK, f"not measured: {'; '.join(NOT_MEASURED)}")


def describe(settings: Settings) -> dict[str, Any]:
    """What the keeper would start. Raises `CannotTell`."""
    command = [sys.executable, "-m", "workers.sampler.engines"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_S, check=False, env=os.environ | settings.environment()
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise CannotTell(f"{' '.join(command[1:])} gave no answer: {error}") from error
    if "error" in answer:
        raise CannotTell(str(answer["error"]))
    return answer


def slots(settings: Settings, rank: int) -> Finding:
    """Versions in flight against what a sampler holds: a job has max_staleness + 2, chat has one."""
    each, held = STALENESS + 2, settings.sampler_max_adapters
    jobs = (held - 1) // each
    detail = f"{held} adapters of rank ≤ {rank}; a job holds max_staleness + 2 ({each} by default), chat 1: {jobs} fit"
    if jobs < settings.runner_slots:
        fix = f"HONE_SAMPLER_MAX_ADAPTERS={settings.runner_slots * each + 1}"
        return Finding("slots", Verdict.WARNING, f"{detail}, HONE_RUNNER_SLOTS={settings.runner_slots}", fix)
    return Finding("slots", Verdict.OK, detail)


def redacted(command: Sequence[str]) -> str:
    """A command line for people: the value of every option that sounds secret is left out."""
    shown: list[str] = []
    for part in command:
        if shown and shown[-1].startswith("--") and "=" not in shown[-1] and _SECRET.search(shown[-1]):
            shown.append("***")
        elif part.startswith("--") and "=" in part and _SECRET.search(part.partition("=")[0]):
            shown.append(f"{part.partition('=')[0]}=***")
        else:
            shown.append(part)
    return shlex.join(shown).replace("'***'", "***")


def _local(found: Mapping[str, Any]) -> Iterator[Finding]:
    servers = f"{found['servers']} servers" if found["servers"] > 1 else "1 server"
    width = f" of {found['tensor_parallel']} GPUs" if found["tensor_parallel"] > 1 else ""
    detail = f"{found['engine']} ({found['why']}); {servers}{width} per model, {found['dtype']}"
    slow = found["slow"]
    yield Finding("sampler", Verdict.WARNING if slow else Verdict.OK, detail, slow)
    if found["engine"] == "vllm" and found["commands"]:
        environment = " ".join(f"{name}={value}" for name, value in found["environments"][0].items())
        yield Finding("command", Verdict.OK, f"{environment} {redacted(found['commands'][0])}")
    shares = found["shares"]
    if shares is not None:
        samplers = " | ".join(",".join(map(str, each)) for each in shares["samplers"])
        trainer = ",".join(map(str, shares["trainer"]))
        kind = "shared" if shares["shared"] else "disjoint"
        jobs = f" divided by {found['jobs']} jobs" if found["jobs"] > 1 else ""
        yield Finding(
            "gpu share",
            Verdict.OK,
            f"{kind}: sampler GPU {samplers} at {shares['sampler_memory']:.0%} of its memory, "
            f"trainer GPU {trainer} at {shares['trainer_memory']:.0%}{jobs}",
        )


def _elsewhere(url: str) -> Finding:
    shown = show_url(url)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(_models_of(url), timeout=DEADLINE_S) as answer:
            served = [str(model["id"]) for model in json.load(answer)["data"] if model.get("parent") is None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HTTPException) as error:
        detail = f"{shown} does not answer: {quoted(error, url)}"
        return Finding("sampler", Verdict.WARNING, detail, "start it: the keeper retries")
    return Finding("sampler", Verdict.OK, f"{shown} serves {', '.join(served)}")


def _models_of(url: str) -> urllib.request.Request:
    """User and password become a header, as in the client that jobs use: urllib would take them for the host."""
    parts = urlsplit(url.rstrip("/"))
    userinfo, _, place = parts.netloc.rpartition("@")
    request = urllib.request.Request(f"{parts.scheme}://{place}{parts.path}/v1/models")
    if userinfo:
        token = base64.b64encode(unquote(userinfo).encode()).decode()
        request.add_header("Authorization", f"Basic {token}")
    return request
