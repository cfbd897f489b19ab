"""`hone doctor`: what this host can do, and what stands in the way of a job; each problem with its one-line fix.

Does not cover: a job's own endpoints, which are dialled when it starts.
"""

from __future__ import annotations

import errno
import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from app.cli.doctor_broker import broker
from app.cli.doctor_database import database
from app.cli.doctor_host import memory, processor, python
from app.cli.doctor_sampler import sampler
from app.cli.doctor_storage import data_directory, storage
from app.cli.failure import BLOCKED
from app.cli.findings import DEADLINE_S, Check, Finding, Verdict

if TYPE_CHECKING:
    from app.core.settings import Settings

LOCAL = "HONE_HOST must be an address of this machine: 127.0.0.1, or 0.0.0.0 for all"
PORT_FIXES = {
    errno.EADDRINUSE: "hone up --port 0, or another HONE_PORT",
    errno.EACCES: "ports below 1024 are root's: take HONE_PORT=8000, with a proxy in front",
}


def run(settings: Settings, *, as_json: bool) -> int:
    """Print the findings; 3 when one of them blocks."""
    found = [finding for check in CHECKS for finding in check(settings)]
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in found], indent=2) + "\n")
    else:
        _show(found)
    return BLOCKED if any(finding.verdict is Verdict.PROBLEM for finding in found) else 0


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
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, settings.port), family=family):
            yield Finding("port", Verdict.OK, f"{where} is free")
            return
    except OSError as error:
        reason, number = error.strerror or str(error), error.errno
    health = _health(settings) if number == errno.EADDRINUSE else None
    if health is None:
        yield Finding("port", Verdict.PROBLEM, f"{where}: {reason}", PORT_FIXES.get(number or 0, LOCAL))
    elif health:
        yield Finding("port", Verdict.WARNING, f"Hone at {where} cannot take a job: {health}", "see its logs directory")
    else:
        yield Finding("port", Verdict.OK, f"{where}: Hone is up and can take a job")


CHECKS: tuple[Check, ...] = (
    python, processor, memory, data_directory, storage, database, broker, base_models, sampler, port,
)  # fmt: skip


def _health(settings: Settings) -> str | None:
    """What the service that listens there is missing: "" nothing, None when it is not Hone."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    netloc = f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"http://{netloc}/healthz", timeout=DEADLINE_S) as answer:
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
    counted = f"{problems} problem{'s' * (problems != 1)}, {warnings} warning{'s' * (warnings != 1)}."
    console.print(counted if problems or warnings else "No problem found.")
