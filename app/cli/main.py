"""The `hone` command: what there is, and how a failure is shown. Nothing heavy is imported before a command runs.

Does not cover: the commands themselves, one module each. Files, jobs and chats have OpenAI's own client and command.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from app.cli import keys, models, webhooks
from app.cli.failure import FAILED, INTERRUPTED, CommandFailed
from app.cli.installation import Data, Json, load_settings
from app.core.errors import ServiceError

cli = typer.Typer(
    name="hone",
    help="Reinforcement fine-tuning for tool-calling agents, on your own machine, with the API of OpenAI's RFT.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage, 3 a check found a blocker, 4 unreachable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
START, LOOK = "Start", "Look"
cli.add_typer(keys.commands, name="keys", rich_help_panel="Service")
cli.add_typer(models.commands, name="models", rich_help_panel="Service")
cli.add_typer(webhooks.commands, name="webhooks", rich_help_panel="Service")


@cli.command("up", rich_help_panel=START)
def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: $HONE_HOST, else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: $HONE_PORT, else 8000; 0: any.")] = None,
    data: Data = None,
) -> None:
    """Start the service and stay: the API, the runner of jobs, the keeper of samplers."""
    # Its own runner looks for jobs, and nobody would hear the bell.
    settings = load_settings(data, host=host, port=port).model_copy(update={"redis_url": None})
    from app.cli.up import run

    raise typer.Exit(run(settings))


@cli.command("api", rich_help_panel=START)
def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: $HONE_HOST, else 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Default: $HONE_PORT, else 8000.")] = None,
    data: Data = None,
) -> None:
    """Serve the API alone; jobs and samplers run under `hone worker` and `hone sampler`, here or elsewhere."""
    settings = load_settings(data, host=host, port=port)
    from app.cli.api import run

    raise typer.Exit(run(settings))


@cli.command("worker", rich_help_panel=START)
def worker(
    queue: Annotated[str, typer.Option(help="Queues to serve, comma-separated; see HONE_QUEUES.")] = "hone",
    gpus: Annotated[
        list[str] | None,
        typer.Option(metavar="0,1", help="GPUs of one slot; again for more slots. Default: one slot, all GPUs."),
    ] = None,
    data: Data = None,
) -> None:
    """Run jobs on this host for an API elsewhere: one at a time per set of GPUs, rung over Redis."""
    settings = load_settings(data)
    from app.cli.worker import run

    raise typer.Exit(run(settings, queue, gpus or []))


@cli.command("sampler", rich_help_panel=START)
def sampler(data: Data = None) -> None:
    """Run the samplers of this host: one keeper, which starts what the jobs want."""
    settings = load_settings(data)
    from app.cli.sampler import run

    raise typer.Exit(run(settings))


@cli.command(
    "demo",
    rich_help_panel=START,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def demo(context: typer.Context) -> None:
    """Train a small agent on this machine and show what it learned (minutes)."""
    from app.cli.demo import demo as command

    inner = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    inner.command()(command)
    inner(args=list(context.args), prog_name="hone demo")


@cli.command("doctor", rich_help_panel=LOOK)
def doctor(data: Data = None, as_json: Json = False) -> None:
    """Look at this host and this installation; each problem comes with its fix."""
    settings = load_settings(data)
    from app.cli.doctor import run

    raise typer.Exit(run(settings, as_json=as_json))


@cli.command("openapi", rich_help_panel=LOOK)
def openapi() -> None:
    """Print the API's contract as YAML, made from the code."""
    from app.cli.contract import document

    sys.stdout.write(document())


@cli.command("version", rich_help_panel=LOOK)
def version() -> None:
    """Print the version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        sys.stdout.write(f"hone {installed('hone-rft')}\n")
    except PackageNotFoundError:
        raise CommandFailed("this source tree is not installed", fix="pip install -e .") from None


def main() -> None:
    """The console script."""
    try:
        cli()
    except CommandFailed as failure:
        sys.stderr.write(f"error: {failure.message}\n")
        if failure.fix is not None:
            sys.stderr.write(f"fix:   {failure.fix}\n")
        sys.exit(failure.code)
    except ServiceError as refused:
        sys.stderr.write(f"error: {refused.message}\n")
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
