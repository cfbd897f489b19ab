"""The pages that repeat code are equal to it."""

from __future__ import annotations

import re
from pathlib import Path

from docs.settings_table import PAGE, page

ROOT = Path(__file__).resolve().parents[3]


def test_the_readme_shows_the_quick_start_as_it_is() -> None:
    found = re.search(r"<!-- quickstart -->\n```python\n(.*?)```\n<!-- /quickstart -->", readme(), re.DOTALL)
    assert found is not None
    assert found[1] == (ROOT / "examples/quickstart.py").read_text()


def test_the_quick_start_needs_nothing_but_the_openai_package() -> None:
    imports = re.findall(r"^(?:from|import) (\w+)", (ROOT / "examples/quickstart.py").read_text(), re.MULTILINE)
    assert set(imports) == {"json", "time", "pathlib", "openai"}


def test_the_settings_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `python -m docs.settings_table`"


def test_every_page_the_documents_name_exists() -> None:
    missing = []
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`((?:docs/)?[\w-]+\.md)`", document.read_text()):
            if not (ROOT / name).exists() and not (ROOT / "docs" / name).exists():
                missing.append(f"{document.name}: {name}")
    assert not missing


def readme() -> str:
    return (ROOT / "README.md").read_text()
