"""The models list: base models, results of jobs, checkpoints; names with `:` and `/`."""

from __future__ import annotations

import json
import time

import openai
import pytest
from openai import OpenAI

from app.db.engine import Database
from app.db.tables import Checkpoint, Job
from tests.api.live_server import LiveServer
from tests.tiny import make_weightless_llama

TUNED = "ft:tiny:hone::abcdefgh"


def _install(server: LiveServer, model_id: str) -> None:
    directory = server.settings.models_dir / model_id
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_text("{}")
    card = {
        "renderer": "hermes",
        "context": 512,
        "lora_targets": ["q_proj"],
        "base_learning_rate": 1e-4,
        "lora_rank": 8,
        "licence": "apache-2.0",
        "hub_id": None,
        "created": 7,
    }
    (directory / "hone.json").write_text(json.dumps(card))


async def _finish_job(database: Database, name: str, project_id: str = "proj_default") -> None:
    job_id = f"ftjob-{project_id}"
    async with database.begin() as session:
        session.add(
            Job(
                id=job_id,
                project_id=project_id,
                status="succeeded",
                model="tiny",
                training_file="file-x",
                seed=1,
                method={},
                options={},
                created_at=time.time(),
                fine_tuned_model=name,
            )
        )
        await session.flush()
        session.add(
            Checkpoint(
                id=f"ftckpt_{project_id}",
                project_id=project_id,
                job_id=job_id,
                step=3,
                attempt=1,
                name=f"{name}:ckpt-step-3",
                base_model="tiny",
                path="x",
                sha256="x",
                metrics={},
                created_at=time.time() - 10,
            )
        )


async def test_the_list_has_base_models_results_and_checkpoints(
    client: OpenAI, live_server: LiveServer, database: Database
) -> None:
    _install(live_server, "tiny")
    await _finish_job(database, TUNED)
    await _finish_job(database, "ft:tiny:other::zzz", "proj_other")
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny", TUNED, f"{TUNED}:ckpt-step-3"]
    assert [model.owned_by for model in listed] == ["system", "org-hone", "org-hone"]
    assert listed[0].created == 7


async def test_a_model_is_found_by_a_name_with_colons_and_slashes(
    client: OpenAI, live_server: LiveServer, database: Database
) -> None:
    _install(live_server, "tiny")
    name = "ft:org/tiny:hone::abcdefgh"
    await _finish_job(database, name)
    for wanted in ("tiny", name, f"{name}:ckpt-step-3"):
        assert client.models.retrieve(wanted).id == wanted


def test_the_directory_of_a_broken_model_is_for_the_operator_only(client: OpenAI, live_server: LiveServer) -> None:
    _install(live_server, "tiny")
    (live_server.settings.models_dir / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(openai.NotFoundError, match="the log of the API says why") as found:
        client.models.retrieve("tiny")
    assert str(live_server.settings.models_dir) not in str(found.value.body)


async def test_a_base_model_says_how_its_format_treats_a_history(client: OpenAI, live_server: LiveServer) -> None:
    make_weightless_llama(live_server.settings.models_dir / "checked")
    _install(live_server, "old")
    checked, old = (client.models.retrieve(name).to_dict()["hone"] for name in ("checked", "old"))
    assert isinstance(checked, dict)
    assert isinstance(old, dict)
    assert (checked["renderer"], checked["history"]["append_only"]) == ("hermes", True)
    assert checked["history"]["cases"]["unicode"] == "exact"
    assert (old["history"]["append_only"], old["history"]["cases"]) == (None, {})


@pytest.mark.parametrize("name", ["nope", "ft:tiny:other::zzz", "org/none", "ft:"])
async def test_an_unknown_or_foreign_model_is_not_found(client: OpenAI, database: Database, name: str) -> None:
    await _finish_job(database, "ft:tiny:other::zzz", "proj_other")
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve(name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
