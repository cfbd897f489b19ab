"""Who gets which GPU: disjoint where there are enough, shares of one where there is only one."""

from __future__ import annotations

import pytest

from workers.devices import Gpu, NotEnoughGpus, has_bf16, parse, share, visible

SMI = """0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559, 9.0
1, GPU-bb22, NVIDIA H100 80GB HBM3, 81559, 9.0
2, GPU-cc33, Tesla T4, [Unknown Error], 7.5
3, GPU-dd44, Tesla T4, 15360, 7.5
"""


def cards(count: int, capability: float = 9.0) -> list[Gpu]:
    return [Gpu(index, f"GPU-{index}", "card", 24_000, capability) for index in range(count)]


def test_the_drivers_table_is_read_and_a_broken_card_left_out() -> None:
    found = parse(SMI)
    assert [gpu.index for gpu in found] == [0, 1, 3]
    assert str(found[0]) == "0: NVIDIA H100 80GB HBM3, 80 GiB"


@pytest.mark.parametrize(
    ("named", "indices"),
    [(None, [0, 1, 3]), ("", []), ("3, 0", [3, 0]), ("GPU-bb", [1]), ("0,7,1", [0]), ("-1", [])],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(named: str | None, indices: list[int]) -> None:
    assert [gpu.index for gpu in visible(parse(SMI), named)] == indices


def test_one_gpu_is_shared_and_leaves_room_for_both() -> None:
    shares = share(cards(1), servers=1, width=1, memory=None)
    assert (shares.samplers, shares.trainer, shares.shared) == (((0,),), (0,), True)
    assert shares.sampler_memory + shares.trainer_memory <= 0.9


def test_a_larger_share_for_the_sampler_is_taken_from_the_trainer() -> None:
    shares = share(cards(1), servers=1, width=1, memory=0.6)
    assert (shares.sampler_memory, shares.trainer_memory) == (0.6, 0.3)


def test_with_more_gpus_sampler_and_trainer_are_disjoint() -> None:
    shares = share(cards(4), servers=1, width=2, memory=None)
    assert (shares.samplers, shares.trainer, shares.sampler_memory) == (((0, 1),), (2, 3), 0.9)


def test_each_server_has_gpus_of_its_own() -> None:
    shares = share(cards(4), servers=2, width=2, memory=None)
    assert shares.samplers == ((0, 1), (2, 3))
    assert shares.shared


def test_too_few_gpus_name_the_settings() -> None:
    with pytest.raises(NotEnoughGpus, match="HONE_VLLM_DATA_PARALLEL"):
        share(cards(1), servers=2, width=1, memory=None)


def test_bf16_needs_an_ampere_card_or_a_processor_that_has_it() -> None:
    assert has_bf16(cards(2, 8.0))
    assert not has_bf16(cards(1, 7.5), frozenset({"amx_bf16"}))
    assert has_bf16([], frozenset({"amx_bf16"}))
    assert not has_bf16([], frozenset({"avx2"}))
