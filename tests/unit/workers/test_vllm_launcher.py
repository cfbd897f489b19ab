"""vLLM's command from settings, model and hardware; and which engine is taken where."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from app.core.settings import Settings
from app.models.catalogue import BaseModel
from tests.tiny import make_weightless_llama
from workers.devices import Gpu
from workers.sampler.engines import NoEngine, choose, describe, trainer_share
from workers.sampler.vllm import RANKS, Vllm, lora_rank

PYTHON = Path(sys.executable)
NOWHERE = Path("/nonexistent/python")


def cards(count: int, capability: float = 9.0) -> list[Gpu]:
    return [Gpu(index, f"GPU-{index}", "card", 24_000, capability) for index in range(count)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@pytest.fixture
def model(settings: Settings) -> BaseModel:
    return make_weightless_llama(settings.models_dir / "tiny")


def after(command: tuple[str, ...], option: str) -> str:
    return command[command.index(option) + 1]


@pytest.mark.parametrize(("wanted", "given"), [(1, 1), (2, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_the_maximal_rank_is_the_smallest_that_vllm_takes(wanted: int, given: int) -> None:
    assert lora_rank(wanted) == given
    assert given in RANKS


def test_on_a_cpu_it_runs_eagerly_with_memory_for_keys_and_values(settings: Settings, model: BaseModel) -> None:
    launch = Vllm(settings.model_copy(update={"sampler_dtype": "float32"}), PYTHON, []).launch(model, 0, 7001)
    assert launch.command[:3] == (str(PYTHON), "-m", "vllm.entrypoints.openai.api_server")
    assert after(launch.command, "--host") == "127.0.0.1"
    assert after(launch.command, "--port") == "7001"
    assert after(launch.command, "--served-model-name") == "tiny"
    assert after(launch.command, "--dtype") == launch.dtype == "float32"
    assert after(launch.command, "--max-model-len") == "2048"
    assert after(launch.command, "--generation-config") == "vllm"
    assert {"--enable-lora", "--enforce-eager"} <= set(launch.command)
    assert "--gpu-memory-utilization" not in launch.command
    assert launch.environment["VLLM_CPU_KVCACHE_SPACE"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in launch.environment


def test_adapters_can_be_loaded_at_run_time_and_nothing_is_reported_home(settings: Settings, model: BaseModel) -> None:
    environment = Vllm(settings, PYTHON, []).launch(model, 0, 1).environment
    for name in ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        assert environment[name] == "1", name


def test_only_the_models_own_targets_take_adapters(settings: Settings, model: BaseModel) -> None:
    command = Vllm(settings, PYTHON, []).launch(model, 0, 1).command
    start = command.index("--lora-target-modules") + 1
    assert command[start : start + len(model.lora_targets)] == model.lora_targets
    assert "lm_head" not in command


def test_slots_and_rank_come_from_the_settings(settings: Settings, model: BaseModel) -> None:
    settings = settings.model_copy(update={"sampler_max_adapters": 12, "sampler_max_lora_rank": 20})
    command = Vllm(settings, PYTHON, []).launch(model, 0, 1).command
    values = [after(command, option) for option in ("--max-loras", "--max-cpu-loras", "--max-lora-rank")]
    assert values == ["12", "24", "32"]


def test_on_a_cpu_the_rank_is_the_models_own_unless_it_is_set(settings: Settings, model: BaseModel) -> None:
    gpu, cpu = (Vllm(settings, PYTHON, found).launch(model, 0, 1) for found in (cards(1), []))
    assert (gpu.max_lora_rank, cpu.max_lora_rank) == (64, lora_rank(model.lora_rank))
    assert after(cpu.command, "--max-lora-rank") == str(cpu.max_lora_rank)
    assert (gpu.seeds, cpu.seeds) == (True, False)
    said = settings.model_copy(update={"sampler_max_lora_rank": 40})
    assert Vllm(said, PYTHON, []).launch(model, 0, 1).max_lora_rank == 64


def test_every_server_runs_on_its_own_gpus_and_the_operators_arguments_come_last(
    settings: Settings, model: BaseModel
) -> None:
    update = {"vllm_data_parallel": 2, "vllm_tensor_parallel": 2, "vllm_args": "--max-num-seqs 64 --note 'a b'"}
    engine = Vllm(settings.model_copy(update=update), PYTHON, cards(5))
    first, second = (engine.launch(model, server, 1) for server in range(engine.servers))
    assert [launch.environment["CUDA_VISIBLE_DEVICES"] for launch in (first, second)] == ["0,1", "2,3"]
    assert first.environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert after(first.command, "--tensor-parallel-size") == "2"
    assert after(first.command, "--gpu-memory-utilization") == "0.9"  # the fifth card is the trainer's
    assert first.command[-4:] == ("--max-num-seqs", "64", "--note", "a b")
    assert "--enforce-eager" not in first.command


def test_one_gpu_is_shared_with_the_trainer(settings: Settings, model: BaseModel) -> None:
    command = Vllm(settings, PYTHON, cards(1)).launch(model, 0, 1).command
    assert after(command, "--gpu-memory-utilization") == "0.45"


@pytest.mark.parametrize(("capability", "dtype"), [(9.0, "bfloat16"), (7.5, "float32")])
def test_the_precision_is_said_and_is_one_the_card_has(settings: Settings, capability: float, dtype: str) -> None:
    assert Vllm(settings, PYTHON, cards(1, capability)).dtype == dtype


@pytest.mark.parametrize(
    ("engine", "gpus", "there", "taken", "why"),
    [
        ("auto", 0, False, "builtin", "no GPU"),
        ("auto", 0, True, "builtin", "faster"),
        ("auto", 1, True, "vllm", "1 GPUs"),
        ("auto", 1, False, "builtin", "no vLLM"),
        ("builtin", 1, True, "builtin", "says so"),
        ("vllm", 0, True, "vllm", "says so"),
    ],
)
def test_the_engine_follows_the_settings_and_the_hardware(
    settings: Settings, engine: str, gpus: int, there: bool, taken: str, why: str
) -> None:
    settings = settings.model_copy(update={"sampler_engine": engine})
    choice = choose(settings, cards(gpus), PYTHON if there else NOWHERE)
    assert choice.engine.name == taken
    assert why in choice.why
    assert (choice.slow is not None) == (gpus > 0 and not there)


def test_a_vllm_that_is_asked_for_and_not_there_is_an_error(settings: Settings) -> None:
    with pytest.raises(NoEngine, match="make vllm-cpu"):
        choose(settings.model_copy(update={"sampler_engine": "vllm"}), [], NOWHERE)
    with pytest.raises(NoEngine, match="HONE_VLLM_PYTHON"):
        choose(settings.model_copy(update={"vllm_python": NOWHERE}), [], PYTHON)


@pytest.mark.parametrize(
    ("update", "gpus", "mine", "memory"),
    [
        ({"vllm_python": PYTHON}, 1, (0,), 0.45),
        ({"vllm_python": PYTHON}, 3, (1, 2), 0.9),
        ({"vllm_python": PYTHON, "runner_slots": 2}, 1, (0,), 0.23),
        ({"sampler_engine": "builtin", "runner_slots": 3}, 1, (0,), 0.3),
        ({"sampler_engine": "builtin"}, 2, (0, 1), 0.9),
        ({"sampler_urls": "http://elsewhere:8000", "vllm_python": PYTHON}, 1, (0,), 0.9),
    ],
)
def test_the_trainer_gets_what_the_samplers_of_this_host_leave(
    settings: Settings, update: dict[str, object], gpus: int, mine: tuple[int, ...], memory: float
) -> None:
    share = trainer_share(settings.model_copy(update=update), cards(gpus), NOWHERE)
    assert (share.gpus, share.memory) == (mine, memory)
    assert share.environment()["CUDA_VISIBLE_DEVICES"] == ",".join(map(str, mine))


def test_the_description_has_the_command_of_every_server(settings: Settings, model: BaseModel) -> None:
    settings = settings.model_copy(update={"vllm_data_parallel": 2, "vllm_python": PYTHON})
    shown = describe(settings, cards(3))
    assert (shown["engine"], shown["servers"], shown["max_lora_rank"]) == ("vllm", 2, 64)
    assert [command[0] for command in shown["commands"]] == [str(PYTHON)] * 2
    assert shown["shares"]["trainer"] == (2,)
