"""openapi.yaml is what the code says, and says what clients rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from app.cli import contract

FILE = Path(__file__).resolve().parents[2] / "openapi.yaml"


@pytest.fixture(scope="module")
def made() -> str:
    return contract.document()


@pytest.fixture(scope="module")
def document(made: str) -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load(made)
    return parsed


def test_the_file_is_up_to_date(made: str) -> None:
    stored = FILE.read_text(encoding="utf-8")
    if stored.splitlines()[0] + "\n" != contract.header():
        pytest.skip(f"openapi.yaml was made with other versions: {stored.splitlines()[0]}")
    assert stored == made, "run `make openapi` and commit the result"


def test_every_operation_has_an_id_of_its_own_a_key_and_the_error_envelope(document: dict[str, Any]) -> None:
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(set(ids)) == len(ids) > 10
    for operation in operations:
        assert operation["security"] == [{"ApiKey": []}], operation["operationId"]
        assert operation["tags"]
        schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/ErrorResponse"}
        assert "422" not in operation["responses"], "validation errors are 400 here"
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    assert set(document["components"]["schemas"]["ErrorBody"]["required"]) == {"message", "type", "param", "code"}


def test_the_operations_have_the_names_of_the_hosted_contract(document: dict[str, Any]) -> None:
    named = {operation["operationId"] for item in document["paths"].values() for operation in item.values()}
    assert {
        "createFile", "listFiles", "retrieveFile", "downloadFile", "deleteFile", "listModels", "retrieveModel",
        "createChatCompletion",
    } <= named  # fmt: skip


def test_no_path_of_this_machine_is_in_it(made: str) -> None:
    assert str(Path.home()) not in made
    assert "/tmp" not in made
