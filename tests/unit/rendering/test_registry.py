"""Which renderer a model gets, and the check at registration."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from app.models.catalogue import BaseModel
from app.rendering.check import History, check_append_only
from app.rendering.conversations import ROLLOUTS
from app.rendering.protocol import ChatRenderer, Message, MessageNotRenderable, NoRenderer, ParsedTurn, Tool
from app.rendering.registry import build_renderer, load_renderer, renderer_names

ASK = [{"role": "user", "content": "How much?"}]


def test_auto_follows_the_hub_id(tiny_qwen3: BaseModel, qwen3: ChatRenderer) -> None:
    found = build_renderer(replace(tiny_qwen3, renderer="auto", hub_id="Qwen/Qwen3-0.6B"))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    conversation = [*ASK, call, {"role": "tool", "content": "1"}]
    assert found.prompt(conversation, None) == qwen3.prompt(conversation, None)


def test_an_unknown_chatml_model_without_tools_gets_hermes(tiny_llama: BaseModel, hermes: ChatRenderer) -> None:
    found = build_renderer(replace(tiny_llama, renderer="auto", hub_id="someone/else"))
    assert found.prompt(ASK, [{"type": "function"}]) == hermes.prompt(ASK, [{"type": "function"}])


def copy_of(model: BaseModel, directory: Path) -> BaseModel:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((model.path / name).read_bytes())
    return replace(model, path=directory)


def test_a_model_with_a_tool_format_of_its_own_must_be_told(tiny_llama: BaseModel, tmp_path: Path) -> None:
    model = copy_of(tiny_llama, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if tools %}...{% endif %}")
    with pytest.raises(NoRenderer, match=r"tool format of its own.*hermes, .*qwen3"):
        build_renderer(replace(model, renderer="auto"))


@pytest.mark.parametrize("name", ["no-such-renderer", "default", "llama-3"])
def test_a_renderer_that_does_not_fit_is_refused_by_name(tiny_llama: BaseModel, name: str) -> None:
    with pytest.raises(NoRenderer, match=name):
        build_renderer(replace(tiny_llama, renderer=name))


def test_a_directory_without_a_fast_tokenizer_is_refused(tiny_llama: BaseModel, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(NoRenderer, match=r"tokenizer\.json"):
        build_renderer(replace(tiny_llama, path=tmp_path))
    with pytest.raises(NoRenderer, match=r"no tokenizer\.json"):
        load_renderer(replace(tiny_llama, path=tmp_path / "gone"))


def test_the_choices_are_text_families(tiny_llama: BaseModel) -> None:
    assert {"hermes", "qwen3", "llama-3"} <= set(renderer_names())
    assert "gemma4" not in renderer_names()


def test_a_renderer_is_built_once_and_shared_by_threads(tiny_llama: BaseModel, tmp_path: Path) -> None:
    model = copy_of(tiny_llama, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        renderers = list(pool.map(load_renderer, [model] * 16))
        prompts = list(pool.map(lambda renderer: renderer.prompt(ASK, None), renderers))
    assert len({id(renderer) for renderer in renderers}) == 1
    assert all(prompt == prompts[0] for prompt in prompts)


def test_rendering_needs_neither_torch_nor_transformers(tiny_qwen3: BaseModel, tiny_llama: BaseModel) -> None:
    program = (
        "import json, sys; from pathlib import Path\n"
        "from app.models.catalogue import read_card; from app.models import pull\n"
        "from app.rendering.registry import load_renderer\n"
        f"for path in {[str(tiny_qwen3.path), str(tiny_llama.path)]!r}:\n"
        "    load_renderer(read_card(Path(path))).prompt([{'role': 'user', 'content': 'x'}], None)\n"
        "print(json.dumps(sorted({'torch', 'transformers', 'trl'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []


class Forgetful:
    """Writes one id per message and renumbers the history with every message."""

    stop_token_ids = (9,)

    def stop_strings(self, *, parallel: bool) -> tuple[str, ...]:
        return ()

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        return [len(messages)] * len(messages)

    def bridge(
        self,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        new_messages: Sequence[Message],
        tools: Sequence[Tool] | None,
    ) -> list[int] | None:
        return [*prompt_ids, *completion_ids, *[9] * len(new_messages)]

    def parse(
        self, completion_ids: Sequence[int], tools: Sequence[Tool] | None, prompt_ids: Sequence[int] | None = None
    ) -> ParsedTurn:
        return ParsedTurn("", None, ())

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)


class Unbridged(Forgetful):
    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        return [token for number in range(len(messages)) for token in (number, 9)]

    def bridge(self, *_: object) -> list[int] | None:
        return None


class OneCall(Forgetful):
    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> list[int]:
        if any(len(message.get("tool_calls") or ()) > 1 for message in messages):
            raise MessageNotRenderable("messages.1.tool_calls", "one call at most")
        return super().prompt(messages, tools)


@pytest.mark.parametrize("name", ["hermes", "qwen3"])
def test_the_check_passes_the_renderers_we_ship(name: str, request: pytest.FixtureRequest) -> None:
    found = check_append_only(request.getfixturevalue(name))
    assert (found.holds, found.bridges, found.inert, found.warnings) == (True, True, True, ())
    assert {found.cases[case] for case in ROLLOUTS} == {History.EXACT}


def test_a_format_that_forgets_reasoning_at_a_user_turn_still_holds(qwen3: ChatRenderer) -> None:
    found = check_append_only(qwen3)
    assert found.cases["reasoning before a later user turn"] is History.NEW_ROOT
    assert found.holds  # a rollout has one user turn: its last


def test_the_check_says_what_differs() -> None:
    changed = check_append_only(Forgetful())
    assert (changed.holds, changed.bridges) == (False, True)
    assert (
        "tool turns, turn 1: the render of the history changes: '2 2' against '4 4 4 4' at token 0" in changed.differs
    )
    assert "is served another prompt" in changed.warnings[0]
    refused = check_append_only(Unbridged())
    assert (refused.holds, refused.bridges) == (False, False)
    assert "tool turns, turn 1: the renderer refuses to bridge it" in refused.differs
    assert "starts a new root" in refused.warnings[0]


def test_what_a_format_cannot_write_is_named() -> None:
    found = check_append_only(OneCall())
    assert found.cases["parallel calls"] is History.REFUSED
    assert "this format cannot write parallel calls" in found.warnings
