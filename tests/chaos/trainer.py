"""The storm's trainer: the real pipe, real bytes on disk, an update without torch. `python -m tests.chaos.trainer`.

Does not cover: the real one (`workers.trainer`), which `python -m tests.chaos --real` runs.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
import shutil
import sys
import time
import traceback
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load, save

from tests.chaos.orders import Orders
from tests.chaos.tiny_policy import TENSOR_FILE, Standing, adapter_files, log_probs, number, read_adapter
from workers.batch import read_batch
from workers.messages import Failed, Progress, ProtocolError, Published, Ready, Start, Step, StepDone, Stop
from workers.trainer import durable
from workers.trainer.pipe import Pipe

LOAD_S, UPDATE_S = 0.2, 0.3
MANIFEST = "manifest.json"


class BrokenSnapshot(Exception):
    """The files are not those of the manifest."""


def write_snapshot(directory: Path, at: Standing) -> tuple[Path, str]:
    files = {
        "adapter.safetensors": save(at.tensors),
        "state.json": json.dumps({"step": at.step, "chain": at.chain}).encode(),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = json.dumps({"step": at.step, "files": digests}).encode()
    final = directory / f"step-{at.step}"
    write(final, {**files, MANIFEST: manifest}, "snapshot")
    return final, hashlib.sha256(manifest).hexdigest()


def read_snapshot(directory: Path) -> Standing:
    """Raises `BrokenSnapshot`."""
    files = verified(directory)
    state = json.loads(files["state.json"])
    return Standing(state["step"], state["chain"], load(files["adapter.safetensors"]))


def verified(directory: Path) -> dict[str, bytes]:
    """Its files, each as the manifest says. Raises `BrokenSnapshot`, `OSError`."""
    manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_bytes())
    files = {name: (directory / name).read_bytes() for name in manifest["files"]}
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != manifest["files"][name]:
            raise BrokenSnapshot(f"{directory / name} is not what the manifest says")
    return files


def write(final: Path, files: Mapping[str, bytes], what: str) -> None:
    """Through the real trainer's writer, which a full disk may stop in the middle."""
    if Orders.of_environment().take(f"disk_full@{what}"):
        durable.write_directory(
            final.with_name(f"{final.name}.tmp-{uuid.uuid4().hex[:8]}"), dict(list(files.items())[:1])
        )
        raise OSError(errno.ENOSPC, f"injected: no space left for {final}")
    if os.environ.get("CHAOS_MUTATION") == "directory" and final.exists():
        shutil.rmtree(final)
    durable.write_directory(final, files)


class Session:
    def __init__(self, start: Start, pipe: Pipe) -> None:
        self.start, self.pipe = start, pipe
        self.canary: list[list[int]] = json.loads(Path(start.canary).read_text())
        self.at = read_snapshot(Path(start.snapshot)) if start.snapshot else Standing.first(start.lora, start.seed)

    def run(self) -> None:
        """Until `Stop`."""
        began = time.monotonic()
        self.pipe.send(Progress("load", 0, 1))
        time.sleep(LOAD_S)
        self.pipe.send(Ready(self.at.step, self.publish(), time.monotonic() - began))
        while not isinstance(message := self.pipe.receive(), Stop):
            if not isinstance(message, Step) or message.step != self.at.step + 1:
                raise ProtocolError(f"expected step {self.at.step + 1}, got {message}")
            self.pipe.send(self.step(message))

    def step(self, message: Step) -> StepDone:
        rows = read_batch(Path(message.batch), message.sha256)
        before = self.at
        self.at = before.after(message.step, message.sha256)
        time.sleep(UPDATE_S)
        adapter = self.publish()
        path, sha256 = write_snapshot(Path(self.start.snapshots_dir), self.at)
        metrics = {
            "loss": 0.0,
            "grad_norm": 1.0,
            "learning_rate": self.start.learning_rate,
            "trained_tokens": float(sum(sum(row.mask) for row in rows)),
            "chain": number(self.at.chain),
            "chain_before": number(before.chain),
        }
        return StepDone(self.at.step, adapter, str(path), sha256, metrics, {"update": UPDATE_S})

    def publish(self) -> Published:
        name = f"{self.start.adapter_prefix}-v{self.at.step}"
        final = Path(self.start.adapters_dir) / name
        files = adapter_files(self.at, self.start.lora, self.start.adapter_prefix)
        weights = read_adapter(files[TENSOR_FILE])
        scores = json.dumps([log_probs(ids, weights) for ids in self.canary]).encode()
        write(final, {**files, "canary.json": scores}, "adapter")
        sha256 = hashlib.sha256(files[TENSOR_FILE]).hexdigest()
        return Published(self.at.step, name, str(final), sha256, str(final / "canary.json"))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-fd", type=int, required=True)
    parser.add_argument("--out-fd", type=int, required=True)
    arguments = parser.parse_args()
    pipe = Pipe(arguments.in_fd, arguments.out_fd)
    try:
        start = pipe.receive()
        if not isinstance(start, Start):
            raise ProtocolError(f"expected Start, got {type(start).__name__}")
        Session(start, pipe).run()
    except Exception as error:
        traceback.print_exc()
        pipe.send(Failed(type(error).__name__, str(error), traceback.format_exc()[-2000:]))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
