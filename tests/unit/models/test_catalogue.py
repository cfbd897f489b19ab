"""What is installed, what is broken, and what the table knows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from app.models.catalogue import BrokenModel, Catalogue, UnknownModel, read_card, write_card
from app.models.known import KNOWN, known
from tests.tiny import make_weightless_llama, make_weightless_qwen3


def test_models_are_listed_by_id_and_read_back_whole(tmp_path: Path) -> None:
    made = [make_weightless_qwen3(tmp_path / "b"), make_weightless_llama(tmp_path / "a")]
    (tmp_path / "half-pulled").mkdir()
    catalogue = Catalogue(tmp_path)
    assert [model.id for model in catalogue.list()] == ["a", "b"]
    assert catalogue.get("a") == made[1]
    check = catalogue.check("a")
    assert (check["append_only"], check["control_tokens_inert"], check["warnings"]) == (True, True, [])
    assert check["cases"]["parallel calls"] == "exact"


def test_an_unknown_model_names_what_is_there_and_how_to_get_more(tmp_path: Path) -> None:
    make_weightless_llama(tmp_path / "tiny")
    with pytest.raises(UnknownModel, match=r"'gpt'.*tiny.*hone models pull") as caught:
        Catalogue(tmp_path).get("gpt")
    assert caught.value.available == ("tiny",)


def test_without_any_model_the_answer_says_so(tmp_path: Path) -> None:
    assert Catalogue(tmp_path / "none").list() == []
    with pytest.raises(UnknownModel, match="no model is installed yet"):
        Catalogue(tmp_path / "none").get("x")


@pytest.mark.parametrize("model_id", ["../secret", "a/b", "", ".hidden", "a\x00b"])
def test_an_id_never_leaves_the_models_directory(tmp_path: Path, model_id: str) -> None:
    make_weightless_llama(tmp_path / "secret")
    with pytest.raises(UnknownModel):
        Catalogue(tmp_path / "models").get(model_id)


@pytest.mark.parametrize(
    ("card", "reason"),
    [("{", "cannot be read"), ("[]", "not a JSON object"), ('{"renderer": "hermes"}', "context")],
)
def test_a_broken_card_is_named_by_get_and_skipped_by_list(tmp_path: Path, card: str, reason: str) -> None:
    make_weightless_llama(tmp_path / "tiny")
    (tmp_path / "tiny" / "hone.json").write_text(card)
    assert Catalogue(tmp_path).list() == []
    with pytest.raises(BrokenModel, match=reason):
        Catalogue(tmp_path).get("tiny")


def test_a_model_whose_weights_are_gone_is_broken(tmp_path: Path) -> None:
    make_weightless_llama(tmp_path / "tiny")
    (tmp_path / "tiny" / "model.safetensors").unlink()
    with pytest.raises(BrokenModel, match="safetensors"):
        Catalogue(tmp_path).get("tiny")


def test_a_card_does_not_store_where_it_lies(tmp_path: Path) -> None:
    model = make_weightless_llama(tmp_path / "tiny")
    write_card(tmp_path / "tiny", replace(model, licence="mit"), {})
    assert {"id", "path"}.isdisjoint(json.loads((tmp_path / "tiny" / "hone.json").read_text()))
    (tmp_path / "tiny").rename(tmp_path / "renamed")
    assert read_card(tmp_path / "renamed").id == "renamed"


def test_the_demo_model_trains_at_the_measured_rate() -> None:
    demo = KNOWN["smollm2-135m-instruct"]
    assert (demo.renderer, demo.rate, demo.rank) == ("hermes", 5e-4, 16)


def test_a_copy_under_another_owner_is_not_the_known_model() -> None:
    assert known("Qwen/Qwen3-0.6B") is known("qwen3-0.6b") is KNOWN["qwen3-0.6b"]
    assert known("someone/Qwen3-0.6B") is None
