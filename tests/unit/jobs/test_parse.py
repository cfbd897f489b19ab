"""A create body: every accepted shape gives one job, every fault names its field. Does not cover: HTTP."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.errors import InvalidRequest
from app.jobs.parse import JobSpec, parse_create, parse_json

GRADER = {
    "type": "string_check",
    "name": "exact",
    "input": "{{sample.output_text}}",
    "reference": "{{item.answer}}",
    "operation": "eq",
}
TOOL = {"name": "lookup", "server_url": "http://127.0.0.1:9/lookup", "headers": {"Authorization": "Bearer s3cret"}}
SHORT_TOOL = {"name": "lookup", "url": TOOL["server_url"], "headers": TOOL["headers"]}


def body(**changes: Any) -> dict[str, Any]:
    made = {
        "model": "tiny",
        "training_file": "file-a",
        "validation_file": "file-b",
        "method": {
            "type": "reinforcement",
            "reinforcement": {"grader": GRADER, "tools": [TOOL], "hyperparameters": {"batch_size": 8}},
        },
        **changes,
    }
    return {key: value for key, value in made.items() if value is not ...}


def with_reinforcement(**changes: Any) -> dict[str, Any]:
    return body(method={"type": "reinforcement", "reinforcement": {"grader": GRADER, **changes}})


def refused(request: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_create(request)
    assert caught.value.param
    assert "\n" not in caught.value.message
    return caught.value


def parse(request: dict[str, Any]) -> JobSpec:
    return parse_create(request)


RFT = {"grader": GRADER, "tools": [SHORT_TOOL], "hyperparameters": {"batch_size": 8}}


@pytest.mark.parametrize(
    "short",
    [
        body(method="rft", rft=RFT),
        body(method="reinforcement", rft=RFT),
        body(method={"type": "rft", "rft": RFT}),
        body(method={"type": "reinforcement", "rft": RFT}),
        body(method={"type": "rft", "reinforcement": RFT}),
        body(method=..., rft=RFT),
    ],
)
def test_every_accepted_shape_gives_the_canonical_method(short: dict[str, Any]) -> None:
    assert parse(short).method == parse(body()).method
    assert parse(short).ignored == ()


def test_the_canonical_method_names_every_hyperparameter() -> None:
    reinforcement = parse(body()).method["reinforcement"]
    assert reinforcement["hyperparameters"] == {
        "n_epochs": "auto",
        "batch_size": 8,
        "learning_rate_multiplier": "auto",
        "compute_multiplier": "auto",
        "eval_interval": "auto",
        "eval_samples": "auto",
        "reasoning_effort": "default",
    }
    assert reinforcement["tools"] == [TOOL]
    assert reinforcement["response_format"] is None


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (body(method="rft"), "rft"),
        (body(method=...), "method"),
        (body(method=7), "method"),
        (body(method="supervised"), "method.type"),
        (body(method={"type": "dpo", "dpo": {}}), "method.type"),
        (body(method={"reinforcement": {}}), "method.type"),
        (body(method={"type": "reinforcement"}), "method.reinforcement"),
        (body(method={"type": "reinforcement", "reinforcement": {"grader": GRADER}}, rft=RFT), "rft"),
        (body(method={"type": "rft", "reinforcement": RFT, "rft": RFT}), "method.rft"),
        (body(method={"type": "reinforcement", "reinforcement": RFT, "supervised": {}}), "method.supervised"),
        (body(method={"type": "reinforcement", "reinforcement": RFT, "x": 1}), "method.x"),
        (with_reinforcement(grader=...), "method.reinforcement.grader"),
        (with_reinforcement(grader={"type": "string_check"}), "method.reinforcement.grader.input"),
        (with_reinforcement(grader={**GRADER, "operation": "gt"}), "method.reinforcement.grader.operation"),
        (with_reinforcement(grader={**GRADER, "extra": 1}), "method.reinforcement.grader.extra"),
        (with_reinforcement(tools=[{"name": "a b", "server_url": "http://h/"}]), "method.reinforcement.tools[0].name"),
        (with_reinforcement(surprise=1), "method.reinforcement.surprise"),
        (with_reinforcement(max_episode_steps=0), "method.reinforcement.max_episode_steps"),
        (with_reinforcement(max_episode_steps=True), "method.reinforcement.max_episode_steps"),
        (with_reinforcement(response_format={"type": "yaml"}), "method.reinforcement.response_format.type"),
        (with_reinforcement(hyperparameters=3), "method.reinforcement.hyperparameters"),
        (body(model=...), "model"),
        (body(model=3), "model"),
        (body(training_file=...), "training_file"),
        (body(validation_file=None), "validation_file"),
        (body(suffix=""), "suffix"),
        (body(suffix="a" * 65), "suffix"),
        (body(suffix="a:b"), "suffix"),
        (body(seed=-1), "seed"),
        (body(seed=2**31), "seed"),
        (body(seed="7"), "seed"),
        (body(metadata={f"k{n}": "v" for n in range(17)}), "metadata"),
        (body(metadata={"k": "v" * 513}), "metadata.k"),
        (body(metadata={"k": 1}), "metadata.k"),
        (body(hyperparameters={"n_epochs": 2}), "hyperparameters"),
        (body(integrations=[{"type": "wandb"}]), "integrations"),
        (body(hone=[]), "hone"),
        (body(hone={"speed": 9}), "hone.speed"),
        (body(hone={"lora_rank": 257}), "hone.lora_rank"),
        (body(hone={"tool_timeout_s": 601}), "hone.tool_timeout_s"),
        (body(hone={"learning_rate": 0}), "hone.learning_rate"),
        (body(hone={"max_staleness": 9}), "hone.max_staleness"),
        (body(hone={"max_staleness": -1}), "hone.max_staleness"),
        (body(hone={"max_gpu_hours": 0}), "hone.max_gpu_hours"),
        (body(hone={"max_gpu_hours": "2"}), "hone.max_gpu_hours"),
        (body(hone={"max_gpu_hours": True}), "hone.max_gpu_hours"),
        (body(hone={"loss_type": "grpo"}), "hone.loss_type"),
        (body(hone={"kl_beta": -0.1}), "hone.kl_beta"),
        (body(hone={"importance_range": [1.5, 2.0]}), "hone.importance_range"),
        (body(hone={"importance_range": [0.5]}), "hone.importance_range"),
        (body(hone={"max_sequence_tv": 0}), "hone.max_sequence_tv"),
        (body(hone={"on_no_signal": "ignore"}), "hone.on_no_signal"),
        (body(hone={"max_trained_rollouts": 0}), "hone.max_trained_rollouts"),
        (body(hone={"max_tokens_per_turn": 9, "max_tokens_per_episode": 8}), "hone.max_tokens_per_turn"),
    ],
)
def test_a_fault_names_its_field(request_: dict[str, Any], param: str) -> None:
    request_ = {**request_}
    method = request_.get("method")
    if isinstance(method, dict) and isinstance(method.get("reinforcement"), dict):
        kept = {k: v for k, v in method["reinforcement"].items() if v is not ...}
        request_["method"] = {**method, "reinforcement": kept}
    assert refused(request_).param == param


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("n_epochs", [0, 51, 1.5, "2", True, "AUTO"], [1, 50, "auto", None]),
        ("batch_size", [0, 257, -1, 8.0], [1, 256, "auto"]),
        ("learning_rate_multiplier", [0, -1, "1", True, 10**400], [0.1, 3, "auto"]),
        ("compute_multiplier", [0.00001, 10.1, 0], [0.00002, 10, 1]),
        ("eval_interval", [0, 0.5], [1, 1000]),
        ("eval_samples", [0, "x", 1001], [1, 64]),
        ("reasoning_effort", ["auto", 1], ["default", "low", "medium", "high", None]),
    ],
)
def test_hyperparameters_keep_the_limits_of_the_contract(name: str, bad: list[Any], good: list[Any]) -> None:
    for value in bad:
        error = refused(with_reinforcement(hyperparameters={name: value}))
        assert error.param == f"method.reinforcement.hyperparameters.{name}", value
    for value in good:
        parse(with_reinforcement(hyperparameters={name: value}))


def test_an_unknown_hyperparameter_is_refused() -> None:
    error = refused(with_reinforcement(hyperparameters={"beta": 1}))
    assert error.param == "method.reinforcement.hyperparameters.beta"
    assert "batch_size" in error.message or "unknown" in error.message.lower()


def test_explicit_nulls_are_as_good_as_nothing() -> None:
    nulls: dict[str, Any] = dict.fromkeys(["suffix", "seed", "metadata", "integrations", "hone", "hyperparameters"])
    assert parse(body(**nulls)).method == parse(body()).method


def test_unknown_top_level_fields_are_named_and_ignored() -> None:
    assert parse(body(trainingType="GlobalStandard")).ignored == ("trainingType",)


def test_options_are_kept_as_given() -> None:
    given = {"lora_rank": 4, "learning_rate": 0.0005, "max_tokens_per_turn": 48, "max_staleness": 0}
    assert parse(body(hone=given)).options == given


def test_the_hash_of_a_request_does_not_depend_on_the_order_of_its_keys() -> None:
    one, other = body(), dict(reversed(body().items()))
    assert parse(one).request_hash == parse(other).request_hash
    assert parse(one).request_hash != parse(body(seed=1)).request_hash


def test_a_remote_reference_in_the_response_schema_is_refused() -> None:
    schema = {"$ref": "http://127.0.0.1:1/schema.json"}
    error = refused(
        with_reinforcement(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}})
    )
    assert error.param == "method.reinforcement.response_format.json_schema.schema"
    assert "outside the schema" in error.message


def test_the_response_format_is_echoed_as_it_was() -> None:
    given = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}}}
    assert parse(with_reinforcement(response_format=given)).method["reinforcement"]["response_format"] == given


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\ud800"}', b"\xff{}"])
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_json(raw)


def test_a_body_nested_too_deeply_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        parse_json(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def test_a_refusal_never_quotes_a_header_value() -> None:
    tool = {"name": "lookup", "server_url": "http://h/", "headers": {"Authorization": "s3cret\r\nX: y"}}
    assert "s3cret" not in refused(with_reinforcement(tools=[tool])).message
