"""HONE_MODELS_ALLOWED: a base model that is installed and not listed there does not exist for clients."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI

from app.core.settings import Settings
from app.models.catalogue import Catalogue, allowed_models
from tests.api.fake_sampler import FakeSampler
from tests.api.jobs_fixture import MODEL, install_model, upload


@pytest.fixture
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    return settings.model_copy(update={"models_allowed": request.param})


def ask(client: OpenAI, model: str) -> str | None:
    return (
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "?"}])
        .choices[0]
        .message.content
    )


@pytest.mark.parametrize("settings", [f"elsewhere, {MODEL}"], indirect=True)
def test_a_model_that_is_not_listed_is_not_found(
    client: OpenAI, settings: Settings, sampler: FakeSampler, tuned: str
) -> None:
    install_model(settings)
    assert [model.id for model in client.models.list() if not model.id.startswith("ft:")] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("bytes")
    for name in ("bytes", tuned):  # what was tuned from it goes with it
        with pytest.raises(openai.NotFoundError):
            ask(client, name)
    body = upload(client).body(model="bytes")
    with pytest.raises(openai.BadRequestError, match="HONE_MODELS_ALLOWED") as caught:
        client.post("/fine_tuning/jobs", body=body, cast_to=object)
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    client.post("/fine_tuning/jobs", body=upload(client).body(), cast_to=object)


@pytest.mark.parametrize("settings", ["bytes"], indirect=True)
def test_a_model_that_is_listed_answers(client: OpenAI, sampler: FakeSampler, tuned: str) -> None:
    assert ask(client, "bytes") == ask(client, tuned) == "84"


@pytest.mark.parametrize("settings", [""], indirect=True)
def test_an_empty_list_allows_all(settings: Settings) -> None:
    install_model(settings)
    catalogue = Catalogue(settings.models_dir, allowed_models(settings.models_allowed))
    assert [model.id for model in catalogue.list()] == [MODEL]
