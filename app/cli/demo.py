"""`hone demo`: the service, an example's server and its training script, from nothing to a before/after table.

Does not cover: the example itself (`examples/`, only in a source checkout). Everything runs in processes of its own, as
it would for a user; this module starts them, waits, and ends them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import demo_probe
from app.cli.demo_processes import Child, Children, DemoFailed, children

MODEL = "smollm2-135m-instruct"
ROOT = Path(__file__).resolve().parents[2]
HONE = (sys.executable, "-m", "app.cli.main")
START_S = 120.0
COMMAND_S = 120.0
PULL_S = 1800.0
PHASES = ("sampling", "tools", "grading", "training", "publication", "evaluation")
NUMBERS = (
    "reward_mean",
    "reward_se",
    "greedy_reward_mean",
    "tool_calls_mean",
    "tool_error_rate",
    "completion_tokens_mean",
    "n",
)
# Where another installation keeps its data is not the demo's business.
FOREIGN = ("HONE_DATA_DIR", "HONE_DATABASE_URL", "HONE_REDIS_URL", "HONE_SECRET_KEY", "HONE_SAMPLER_URLS", "HONE_HOST")


class Example(StrEnum):
    SHOP = "shop"
    PAIRS = "pairs"


def demo(
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Prices, order of the data, and the job.")] = 1,
    report: Annotated[Path | None, typer.Option(help="Write the numbers to this JSON file.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the data in ./demo-data.")] = False,
    example: Annotated[Example, typer.Option(help="shop: one lookup. pairs: two in parallel.")] = Example.SHOP,
) -> None:
    """Train a small agent on this machine and show what it learned."""
    begun = time.monotonic()
    try:
        code = run(seed, report, keep, example, begun)
    except (DemoFailed, demo_probe.NoTorch) as error:
        typer.echo(f"demo: {error}", err=True)
        code = 1
    except subprocess.TimeoutExpired:
        typer.echo("demo: this host is too busy to measure its speed; try again when it is idle", err=True)
        code = 1
    except KeyboardInterrupt:
        typer.echo("demo: stopped", err=True)
        code = 130
    raise typer.Exit(code)


def run(seed: int, report: Path | None, keep: bool, example: Example, begun: float) -> int:
    """The exit code of the training script. `begun`: time.monotonic() of the command's start."""
    if not (ROOT / "examples" / example / "train.py").is_file():
        raise DemoFailed("the examples are not part of the installed package; run `make demo` in a source checkout")
    speed = demo_probe.measure()
    slow = " This host is slow for it:" if speed.gflops < demo_probe.SLOW_GFLOPS else ""
    typer.echo(f"{speed.gflops:.0f} GFLOPS ({speed.dtype}).{slow} expect about {speed.minutes} minutes.")
    data = Path("demo-data").resolve() if keep else Path(tempfile.mkdtemp(prefix="hone-demo-"))
    found = data / "report.json"
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        found.unlink(missing_ok=True)
        with children() as started:
            code = _train(started, data, found, seed, example)
    except BaseException:
        typer.echo(f"demo: the logs are in {data}", err=True)
        raise
    if code == 0 and report is not None:
        numbers = summary(json.loads(found.read_text()), time.monotonic() - begun, speed.gflops)
        report.write_text(json.dumps(numbers, indent=2) + "\n")
    if keep:
        typer.echo(f"The data stays in {data}; `hone up --data {data}` serves the tuned model again.")
    elif code == 0:
        shutil.rmtree(data)
    else:
        typer.echo(f"demo: the logs are in {data}", err=True)
    return code


def _train(started: Children, data: Path, found: Path, seed: int, example: Example) -> int:
    env = _environment(data)
    _provide_model(data, env)
    shop_env = {**env, "SHOP_SALT": f"{example}-{seed}", "SHOP_TOKEN": f"demo-{os.urandom(12).hex()}"}
    server = started.start(
        "the example's server",
        [sys.executable, "-m", "examples.shop.server", "--port", "0"],
        cwd=ROOT,
        env=shop_env,
        log=data / "shop.log",
    )
    shop_url = server.first_line(START_S)
    env["HONE_EGRESS_ALLOW"] = shop_url.removeprefix("http://")  # the guard refuses private addresses otherwise

    port = _free_port()
    up = started.start(
        "hone up",
        [*HONE, "up", "--host", "127.0.0.1", "--port", str(port), "--data", str(data)],
        cwd=ROOT,
        env=env,
        log=data / "hone-up.log",
    )
    url = f"http://127.0.0.1:{port}"
    _wait_until_healthy(up, url)
    key = _hone(env, "keys", "create", "demo", timeout_s=COMMAND_S).strip()
    typer.echo(f"Hone answers at {url}/v1, the example's tool and grader at {shop_url}.")
    train = started.start(
        "the training script",
        [sys.executable, "-m", f"examples.{example}.train", f"--seed={seed}", f"--model={MODEL}", f"--report={found}"],
        cwd=ROOT,
        env={**shop_env, "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key, "SHOP_URL": shop_url},
    )
    while (code := train.returncode) is None:
        for child in (up, server):
            if child.returncode is not None:
                raise DemoFailed(f"{child.name} ended with {child.returncode} while the job ran:\n{child.log_tail()}")
        time.sleep(0.2)
    return code


def _hone(env: Mapping[str, str], *arguments: str, timeout_s: float) -> str:
    """One `hone` command to its end; its standard output."""
    try:
        done = subprocess.run(
            [*HONE, *arguments], cwd=ROOT, env=dict(env), capture_output=True, text=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise DemoFailed(f"`hone {' '.join(arguments)}` took longer than {timeout_s:.0f} s") from error
    if done.returncode != 0:
        raise DemoFailed(f"`hone {' '.join(arguments)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _environment(data: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in FOREIGN}
    local = ",".join(filter(None, [kept.get("NO_PROXY"), "127.0.0.1", "localhost"]))
    return {**kept, "HONE_DATA_DIR": str(data), "NO_PROXY": local, "no_proxy": local}


def _provide_model(data: Path, env: Mapping[str, str]) -> None:
    """The model is fetched once per user and linked into every demo's data directory."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hone"
    model = cache / "models" / MODEL
    if not model.is_dir():
        typer.echo(f"Fetching {MODEL} into {cache / 'models'} …")
        _hone({**env, "HONE_DATA_DIR": str(cache)}, "models", "pull", MODEL, timeout_s=PULL_S)
    link = data / "models" / MODEL
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(model, target_is_directory=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _wait_until_healthy(up: Child, url: str) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline, last = time.monotonic() + START_S, "no answer"
    while time.monotonic() < deadline:
        if up.returncode is not None:
            break
        try:
            with direct.open(f"{url}/healthz", timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            last = str(error)
        time.sleep(0.2)
    raise DemoFailed(f"`hone up` is not healthy ({last}). The end of its log:\n{up.log_tail()}")


def summary(found: Mapping[str, Any], total_s: float, gflops: float) -> dict[str, Any]:
    """The report of `hone demo`, from that of the training script."""
    seconds = found.get("seconds") or {}
    return {
        "seed": found["seed"],
        "model": found["model"],
        "baseline": {name: found["baseline"][name] for name in NUMBERS},
        "final": {name: found["final"][name] for name in NUMBERS},
        "seconds": {"total": round(total_s, 1), **{phase: round(seconds.get(phase, 0.0), 1) for phase in PHASES}},
        "gemm_gflops": round(gflops, 1),
    }
