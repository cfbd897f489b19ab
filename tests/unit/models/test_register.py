"""A local directory becomes a base model, or says why not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from app.models.catalogue import Catalogue
from app.models.register import AlreadyRegistered, NotAModel, register
from app.rendering.protocol import NoRenderer
from tests.tiny import make_weightless_llama


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_weightless_llama(tmp_path / "source")
    return tmp_path / "source"


def test_a_directory_is_registered_with_its_own_context_and_linked_weights(source: Path, tmp_path: Path) -> None:
    model = register(source, "mine", tmp_path / "models", licence="mit", now=lambda: 7.9)
    assert model == Catalogue(tmp_path / "models").get("mine")
    assert (model.renderer, model.context, model.licence, model.created, model.hub_id) == ("auto", 2048, "mit", 7, None)
    assert (model.path / "model.safetensors").samefile(source / "model.safetensors")
    assert not (model.path / "tokenizer.json").samefile(source / "tokenizer.json")


def test_a_known_hub_id_brings_its_defaults(source: Path, tmp_path: Path) -> None:
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = register(source, "mine", tmp_path / "models", hub_id=hub_id, lora_rank=8)
    assert (model.renderer, model.base_learning_rate, model.lora_rank) == ("hermes", 5e-4, 8)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_directory_is_refused_by_the_missing_file(source: Path, tmp_path: Path, missing: str) -> None:
    (source / missing).unlink()
    with pytest.raises(NotAModel, match=missing.removeprefix("model")):
        register(source, "mine", tmp_path / "models")


def test_an_id_is_taken_once(source: Path, tmp_path: Path) -> None:
    register(source, "mine", tmp_path / "models")
    with pytest.raises(AlreadyRegistered, match="--id"):
        register(source, "mine", tmp_path / "models")
    with pytest.raises(NotAModel, match="no model id"):
        register(source, "../mine", tmp_path / "models")


def test_a_model_without_a_renderer_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NoRenderer):
        register(source, "mine", tmp_path / "models", renderer="llama-3")
    assert list((tmp_path / "models").iterdir()) == []


def test_weights_on_another_disk_are_symbolic_links(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    model = register(source, "mine", tmp_path / "models")
    assert (model.path / "model.safetensors").is_symlink()
    assert (source / "model.safetensors").is_file()


def test_a_config_without_a_length_gets_the_default(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert register(source, "mine", tmp_path / "models").context == 4096
