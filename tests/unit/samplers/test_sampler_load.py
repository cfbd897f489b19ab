"""A sampler's load is read from its metrics, whoever wrote them."""

from __future__ import annotations

import pytest

from app.samplers.metrics import RUNNING, WAITING, LoadUnreadable, SamplerLoad, parse_load, together

# As vLLM 0.32 writes it: help, types, labels, a counter with its creation time, a neighbour with a longer name.
VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny {x} y"} 3.0
vllm:num_requests_running{engine="1",model_name="tiny {x} y"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 100.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:num_preemptions_total counter
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
# TYPE vllm:num_preemptions_created gauge
vllm:num_preemptions_created{engine="0",model_name="m"} 1.8e+09
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+06
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 9.0
"""


def test_engines_of_one_server_add_up_and_the_fullest_cache_counts() -> None:
    assert parse_load(VLLM) == SamplerLoad(
        running=7, waiting=1, kv_usage=0.75, preemptions=2, generation_tokens=1_500_000
    )


def test_lines_without_labels_are_read_too() -> None:
    text = "vllm:num_requests_running 5\nvllm:num_requests_waiting 0\nvllm:generation_tokens_total 12\n"
    assert parse_load(text) == SamplerLoad(5, 0, 0.0, 0, 12)


def test_a_value_that_is_no_number_yet_is_left_out() -> None:
    text = "vllm:num_requests_running 5\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc NaN\n"
    assert parse_load(text).kv_usage == 0.0


@pytest.mark.parametrize(
    "text",
    ["", "vllm:num_requests_running 5\n", "<html>", f"{RUNNING} five\n{WAITING} 0"],
)
def test_what_is_not_a_samplers_text_is_refused(text: str) -> None:
    with pytest.raises(LoadUnreadable):
        parse_load(text)


def test_several_samplers_are_one_load() -> None:
    one, two = SamplerLoad(3, 1, 0.2, 5, 100), SamplerLoad(4, 0, 0.9, 1, 50)
    assert together([one, two]) == SamplerLoad(7, 1, 0.9, 6, 150, samplers=2)
