"""A sampler that serves another policy behind the new name is found before a rollout is used; `-s` prints the table.

Does not cover: engines that were not started here; vLLM runs where HONE_TEST_VLLM_PYTHON names its interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from app.core.settings import Settings
from app.db.engine import Database
from tests.contract.proof.engines import serving, write_model
from tests.contract.proof.injection import CORRUPT, Bench, Row, show
from tests.contract.sampler.servers import ENGINES
from workers import publication

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # read by peft
]


@dataclass(frozen=True)
class Served:
    engine: str
    dtype: str
    model: Path
    url: str


@pytest.fixture(scope="module", params=[(engine, dtype) for engine in ENGINES for dtype in ("float32", "bfloat16")])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine, dtype = request.param
    scratch = tmp_path_factory.mktemp(f"{engine}-{dtype}")
    model = write_model(scratch / "model")
    with serving(engine, dtype, model, scratch) as url:
        yield Served(engine, dtype, model, url)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("trainer", ["float32", "bfloat16"])
async def test_each_wrong_policy_is_caught_or_said_to_be_unresolvable(
    served: Served, trainer: str, settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (served.dtype, trainer) == ("float32", "bfloat16"):
        pytest.skip("no set-up trains in less than it samples in")
    monkeypatch.setattr(publication, "COPY_PAUSE_S", 0.0)
    bench = Bench(settings, database, served.url, served.model, served.dtype, trainer)
    await bench.register()
    rows = await bench.table(trainer)
    show(f"{served.engine} in {served.dtype}, trainer in {trainer}", rows)
    for row in rows:
        assert _as_it_must_be(row, exact=served.dtype == "float32"), row
    checked = [row for row in rows if row.checked]
    assert [(row.fault, row.caught) for row in checked] == [(fault, "files") for fault in CORRUPT]


def _as_it_must_be(row: Row, *, exact: bool) -> bool:
    if row.fault == "none":
        return row.caught is None
    if exact or row.fault == "NaN" or row.checked:
        return row.caught is not None
    return row.caught is not None or row.gates["b"]["verdict"] == "not_resolvable"
