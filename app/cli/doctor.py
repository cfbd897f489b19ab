"""`hone doctor`: what this host can do, and what stands in the way of a job; each problem with its one-line fix.

Does not cover: a job's own endpoints, which are dialled when it starts.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli import demo_probe
from app.cli.doctor_sampler import sampler
from app.cli.failure import BLOCKED
from app.cli.findings import Check, Finding, Verdict

if TYPE_CHECKING:
    from app.core.settings import Settings

GIB = 1024**3
LOW_DISK, NO_DISK = 10 * GIB, 1 * GIB
LOW_MEMORY = 4 * GIB
TRAIN = ("torch", "transformers", "trl", "peft", "accelerate")
PROBE_S = 5.0

__all__ = ["CHECKS", "Finding", "Verdict", "run"]


def run(settings: Settings, *, as_json: bool) -> int:
    """Print the findings; 3 when one of them blocks."""
    found = [finding for check in CHECKS for finding in check(settings)]
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    else:
        _show(found)
    return BLOCKED if any(finding.verdict is Verdict.PROBLEM for finding in found) else 0


def python(settings: Settings) -> Iterator[Finding]:
    yield Finding("python", Verdict.OK, f"{platform.python_version()} in {sys.prefix}")
    absent = [name for name in TRAIN if importlib.util.find_spec(name) is None]
    if absent:
        yield Finding("training", Verdict.PROBLEM, f"missing: {', '.join(absent)}", "pip install 'hone-rft[train]'")
    else:
        yield Finding("training", Verdict.OK, ", ".join(f"{name} {_version(name)}" for name in TRAIN))


def processor(settings: Settings) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    bf16 = sorted({"avx512_bf16", "amx_bf16"} & _cpu_flags())
    yield Finding("cores", Verdict.OK, f"{cores}, {settings.cpu_threads} used; bf16: {', '.join(bf16) or 'emulated'}")
    gpus = _gpus()
    if gpus:
        yield Finding("gpu", Verdict.OK, "; ".join(gpus))
    try:
        speed = demo_probe.measure()
    except (demo_probe.NoTorch, subprocess.TimeoutExpired) as error:
        yield Finding("matrices", Verdict.WARNING, f"not measured: {error}")
        return
    slow = speed.gflops < demo_probe.SLOW_GFLOPS and not gpus
    yield Finding(
        "matrices",
        Verdict.WARNING if slow else Verdict.OK,
        f"{speed.gflops:.0f} GFLOPS in {speed.dtype}; the demo takes about {speed.minutes} min",
        "stop other work on this host, or use one with more cores" if slow else None,
    )


def memory(settings: Settings) -> Iterator[Finding]:
    free = _free_memory()
    if free is None:
        yield Finding("memory", Verdict.WARNING, "unknown on this system")
    elif free < LOW_MEMORY:
        yield Finding("memory", Verdict.WARNING, f"{free / GIB:.1f} GB free", "close programs: the demo needs 4 GB")
    else:
        yield Finding("memory", Verdict.OK, f"{free / GIB:.1f} GB free")


def data_directory(settings: Settings) -> Iterator[Finding]:
    root = settings.root
    existing = next(path for path in (root, *root.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        yield Finding("data", Verdict.PROBLEM, f"{existing} cannot be written", "choose another with --data DIR")
        return
    yield Finding("data", Verdict.OK, f"{root}{'' if root.exists() else ' (made by `hone up`)'}")
    free = shutil.disk_usage(existing).free
    detail, fix = f"{free / GIB:.1f} GB free", "free some space, or choose another disk with --data DIR"
    if free < NO_DISK:
        yield Finding("disk", Verdict.PROBLEM, detail, fix)
    elif free < LOW_DISK:
        yield Finding("disk", Verdict.WARNING, detail, fix)
    else:
        yield Finding("disk", Verdict.OK, detail)


def database(settings: Settings) -> Iterator[Finding]:
    from alembic.script import ScriptDirectory
    from sqlalchemy import func, select, text
    from sqlalchemy.exc import SQLAlchemyError

    from app.db import migrate
    from app.db.engine import Database
    from app.db.tables import ApiKey

    if settings.database_url is None and not (settings.root / "hone.db").exists():
        yield Finding("database", Verdict.OK, "none yet; `hone up` makes it")
        return

    async def look() -> tuple[str | None, int]:
        opened = Database(settings.database)
        try:
            async with opened.read() as session:
                revision = await session.scalar(text("SELECT version_num FROM alembic_version"))
                keys = await session.scalar(select(func.count()).where(ApiKey.revoked_at.is_(None)))
                return revision, keys or 0
        finally:
            await opened.close()

    scripts = ScriptDirectory.from_config(migrate.config(settings.database))
    try:
        revision, keys = asyncio.run(look())
    except (SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        yield Finding("database", Verdict.PROBLEM, reason, "check HONE_DATABASE_URL; `hone up` makes the tables")
        return
    known = {script.revision for script in scripts.walk_revisions()}
    if revision == scripts.get_current_head():
        yield Finding("database", Verdict.OK, f"revision {revision}")
    elif revision in known:
        yield Finding("database", Verdict.WARNING, f"revision {revision} is old", "start `hone up`: it migrates")
    else:
        yield Finding("database", Verdict.PROBLEM, f"revision {revision} is newer than this code", "upgrade hone-rft")
    if keys:
        yield Finding("keys", Verdict.OK, f"{keys} in use")
    else:
        yield Finding("keys", Verdict.WARNING, "none", "hone keys create NAME")


def base_models(settings: Settings) -> Iterator[Finding]:
    from app.models.catalogue import CARD, BrokenModel, Catalogue

    catalogue = Catalogue(settings.models_dir)
    models = catalogue.list()
    if models:
        yield Finding("models", Verdict.OK, ", ".join(model.id for model in models))
    else:
        yield Finding("models", Verdict.WARNING, "none", "hone models pull smollm2-135m-instruct")
    for card in sorted(settings.models_dir.glob(f"[!.]*/{CARD}")):
        try:
            catalogue.get(card.parent.name)
        except BrokenModel as error:
            yield Finding("models", Verdict.WARNING, str(error), f"rm -r {card.parent}")


def port(settings: Settings) -> Iterator[Finding]:
    where = f"{settings.host}:{settings.port}"
    try:
        with socket.create_server((settings.host, settings.port)):
            yield Finding("port", Verdict.OK, f"{where} is free")
            return
    except OSError as error:
        reason = error.strerror or str(error)
    health = _health(settings)
    if health is None:
        yield Finding("port", Verdict.PROBLEM, f"{where}: {reason}", "hone up --port 0, or another HONE_PORT")
    elif health:
        yield Finding("port", Verdict.WARNING, f"Hone at {where} cannot take a job: {health}", "see its logs directory")
    else:
        yield Finding("port", Verdict.OK, f"{where}: Hone is up and can take a job")


CHECKS: tuple[Check, ...] = (python, processor, memory, data_directory, database, base_models, sampler, port)


def _health(settings: Settings) -> str | None:
    """What the service that listens there is missing: "" nothing, None when it is not Hone."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{settings.host}:{settings.port}/healthz", timeout=PROBE_S) as answer:
            answered: dict[str, object] = json.load(answer)
    except urllib.error.HTTPError as error:
        try:
            answered = json.load(error)
        except ValueError:
            return None
    except (OSError, ValueError):
        return None
    missing = answered.get("missing") if isinstance(answered, dict) else None
    return None if not isinstance(missing, dict) else "; ".join(f"{key}: {value}" for key, value in missing.items())


def _show(found: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    marks = {Verdict.OK: ("✓", "green"), Verdict.WARNING: ("!", "yellow"), Verdict.PROBLEM: ("✗", "red")}
    console = Console(highlight=False)
    for finding in found:
        mark, colour = marks[finding.verdict]
        line = Text.assemble((mark, colour), f" {finding.name:<9} {finding.detail}")
        console.print(line, soft_wrap=True)
        if finding.fix is not None:
            console.print(Text(f"  fix:      {finding.fix}", "bold"), soft_wrap=True)
    problems = sum(finding.verdict is Verdict.PROBLEM for finding in found)
    warnings = sum(finding.verdict is Verdict.WARNING for finding in found)
    console.print(f"{problems} problems, {warnings} warnings." if problems or warnings else "No problem found.")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return set(line.partition(":")[2].split())


def _free_memory() -> int | None:
    """Bytes that a new process may take: what the kernel says, cut by the container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def _gpus() -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except subprocess.TimeoutExpired:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
