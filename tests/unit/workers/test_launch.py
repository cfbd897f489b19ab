"""A launch file says what happens, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.launch import BadLaunch, Launch, read_launch

SHIPPED = Path(__file__).parents[3] / "deploy" / "accelerate"


def test_the_shipped_files_are_what_they_say() -> None:
    found = {path.stem: read_launch(path) for path in SHIPPED.glob("*.yaml")}
    assert found == {"ddp": Launch(2, shard_base=False), "fsdp": Launch(2, shard_base=True)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("distributed_type: DEEPSPEED", "DEEPSPEED is not supported"),
        ("{distributed_type: MULTI_GPU, num_processes: 2, num_machines: 2}", "num_machines 2"),
        ("{distributed_type: FSDP, num_processes: 2, fsdp_config: {fsdp_version: 1}}", "fsdp_version 1"),
        (
            "{distributed_type: FSDP, num_processes: 2, fsdp_config: {fsdp_use_orig_params: true}}",
            "fsdp_use_orig_params",
        ),
        ("{distributed_type: MULTI_GPU, num_processes: 2, fsdp_config: {fsdp_version: 2}}", "without"),
        ("{distributed_type: MULTI_GPU, num_processes: 0}", "num_processes 0"),
        ("num_processes: 4", "does not go with distributed_type NO"),
        ("{distributed_type: MULTI_GPU, mixed_precision: fp8}", "fp8"),
        ("[1, 2]", "mapping"),
        ("a: [", "expected"),
    ],
)
def test_what_the_trainer_does_not_do_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "launch.yaml").write_text(text)
    with pytest.raises(BadLaunch, match=words):
        read_launch(tmp_path / "launch.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadLaunch, match=r"nowhere\.yaml"):
        read_launch(tmp_path / "nowhere.yaml")
