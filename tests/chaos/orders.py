"""Faults ordered across processes: the storm leaves a file, and the process that is where it fits takes it, once.

Does not cover: what is done then (`faulty`), nor faults that the storm inflicts from outside (`faults`).
"""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

VARIABLE = "CHAOS_DIR"


@dataclass(frozen=True)
class Orders:
    """`given` holds what waits, `taken` what was done; a rename decides who takes one. `frozen`: who stopped itself."""

    root: Path
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @classmethod
    def of_environment(cls) -> Orders:
        return cls(Path(os.environ[VARIABLE]))

    def prepare(self) -> None:
        for name in ("given", "taken", "frozen"):
            (self.root / name).mkdir(parents=True, exist_ok=True)

    def give(self, kind: str) -> Path:
        path = self.root / "given" / f"{kind}.{next(self._numbers)}"
        path.touch()
        return path

    def take(self, kind: str) -> bool:
        """Is one of this kind waiting? Then it is ours."""
        for name in os.listdir(self.root / "given"):
            if name.rpartition(".")[0] == kind:
                try:
                    (self.root / "given" / name).rename(self.root / "taken" / name)
                except FileNotFoundError:
                    continue
                return True
        return False

    def withdraw(self, path: Path) -> bool:
        """False when it was taken meanwhile."""
        try:
            path.unlink()
        except FileNotFoundError:
            return False
        return True

    def freeze_myself(self) -> None:
        """Every thread of this process stops here, until the storm thaws it."""
        (self.root / "frozen" / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGSTOP)

    def frozen(self) -> list[int]:
        """Process ids, each told once."""
        found = [int(name) for name in os.listdir(self.root / "frozen")]
        for pid in found:
            (self.root / "frozen" / str(pid)).unlink()
        return found
