from __future__ import annotations

import subprocess

import pytest

from app.cli.main import cli
from app.core.settings import PREFIX, Settings
from tests.unit.deploy.composition import COMPOSITION, FILE, OURS, SERVICES, tool

CHECK = tool("check-jsonschema")


@pytest.mark.skipif(CHECK is None, reason="needs check-jsonschema, which has the schema")
def test_the_composition_obeys_the_specification() -> None:
    done = subprocess.run(
        [str(CHECK), "--builtin-schema", "vendor.compose-spec", str(FILE)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_what_is_used_is_declared_and_what_is_declared_is_used() -> None:
    named = {"secrets": set[str](), "volumes": set[str](), "networks": set[str]()}
    for service in SERVICES.values():
        named["secrets"] |= set(service.get("secrets", ()))
        named["volumes"] |= {volume.partition(":")[0] for volume in service.get("volumes", ())}
        named["networks"] |= set(service.get("networks", ()))
    assert named == {kind: set(COMPOSITION[kind]) for kind in named}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_checked_given_time_to_stop_and_its_logs_are_bounded(name: str) -> None:
    service = SERVICES[name]
    assert service["healthcheck"]["test"]
    assert service["stop_grace_period"]
    assert service["restart"] == "unless-stopped"
    assert service["logging"]["options"]["max-size"]


def test_only_the_api_is_reachable_and_only_from_this_host() -> None:
    open_ports = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert open_ports == {"api": ["127.0.0.1:${HONE_PORT:-8000}:8000"]}
    for name in ("postgres", "redis", "vllm"):
        assert all(COMPOSITION["networks"][network].get("internal") for network in SERVICES[name]["networks"])


@pytest.mark.parametrize("name", OURS)
def test_our_containers_hold_no_right_they_do_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["user"].endswith(":0")
    assert not service["user"].startswith("0")
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "privileged" not in service


def test_a_secret_is_a_file_that_the_service_mounts_and_never_a_value() -> None:
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if variable.endswith("_FILE"):
                assert value.removeprefix("/run/secrets/") in service["secrets"], name
            else:
                assert not any(word in variable for word in ("PASSWORD", "SECRET", "KEY", "DATABASE_URL", "REDIS_URL"))


def test_every_variable_is_a_setting_of_ours() -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    for name in OURS:
        given = {variable.removesuffix("_FILE") for variable in SERVICES[name]["environment"]}
        assert given - known == set(), name


@pytest.mark.parametrize("name", OURS)
def test_the_commands_exist(name: str) -> None:
    program, command = SERVICES[name]["command"]
    assert program == "hone"
    assert command in {registered.name for registered in cli.registered_commands}


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_a_profile_has_a_worker_and_a_sampler(profile: str) -> None:
    chosen = [service for service in SERVICES.values() if profile in service.get("profiles", [profile])]
    commands = [service["command"][1] for service in chosen if "build" in service]
    assert sorted(commands) == ["api", "sampler", "worker"]


def test_who_loads_an_adapter_sees_the_directory_it_was_written_to() -> None:
    mounts = {SERVICES[name]["volumes"][0].removesuffix(":ro") for name in [*OURS, "vllm"]}
    assert mounts == {"data:/var/lib/hone"}


def test_the_engine_that_listens_on_the_loopback_shares_it_with_those_that_ask_it() -> None:
    assert {SERVICES[name]["network_mode"] for name in ("worker-cpu", "sampler-cpu")} == {"service:api"}
