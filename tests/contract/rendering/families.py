"""Every renderer an operator may choose, over a small tokenizer that has its family's control tokens.

Does not cover: the real vocabularies. Ids and merges of plain text differ; where a control token begins and ends, which
is what bridges depend on, does not. The tables were recorded from what each renderer looks up when it is built.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from app.models.catalogue import BaseModel
from tests.tiny import make_weightless_llama

_DEEPSEEK = "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
_DEEPSEEK_TOOLS = " ".join(
    f"<｜tool▁{kind}▁{edge}｜>" for kind in ("calls", "call", "outputs", "output") for edge in ("begin", "end")
)
_GLM = "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>"
_GLM_TAGS = "<think> </think> <tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>"
_RESPONSE = "<tool_response> </tool_response>"
_THINK = "<think> </think> <tool_call> </tool_call>"
_CHATML = "<|im_start|> <|im_end|> <|endoftext|>"
_VISION = "<|vision_start|> <|vision_end|> <|image_pad|> <|video_pad|>"
_LAGUNA = f"〈|EOS|〉 <assistant> </assistant> {_THINK}"
_HY = ["tool_calls", "tool_call", "arg_key", "arg_value", "tool_responses", "tool_response", "think"]

CONTROL: dict[str, str] = {
    "hermes": _CHATML,
    "deepseek-r1": f"{_DEEPSEEK} {_DEEPSEEK_TOOLS} <｜tool▁sep｜> <think> </think>",
    "deepseek-v3": f"{_DEEPSEEK} {_DEEPSEEK_TOOLS} <｜tool▁sep｜>",
    "deepseek-v4": f"{_DEEPSEEK} <｜latest_reminder｜> <think> </think> ｜DSML｜ <｜action｜> <｜query｜> "
    "<｜authority｜> <｜domain｜> <｜title｜> <｜read_url｜>",
    "glm-4.5": f"{_GLM} {_GLM_TAGS}",
    "glm-5": f"{_GLM} {_GLM_TAGS} {_RESPONSE}",
    "glm-5.1": f"{_GLM} {_GLM_TAGS} {_RESPONSE}",
    "glm-5.3": f"{_GLM} {_GLM_TAGS} {_RESPONSE}",
    "hy3": "<｜hy_begin_of_sentence:opensource｜> <｜hy_eos:opensource｜> <｜hy_User:opensource｜> "
    "<｜hy_Assistant:opensource｜> <｜reasoning_mode:opensource｜> <tool_sep:opensource> "
    + " ".join(f"<{edge}{tag}:opensource>" for tag in _HY for edge in ("", "/")),
    "kimi-k2": "<|im_user|> <|im_assistant|> <|im_system|> <|im_middle|> <|im_end|> <|tool_calls_section_begin|> "
    "<|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_argument_begin|> <|tool_call_end|>",
    "laguna-m.1": _LAGUNA,
    "laguna-s-2.1": _LAGUNA,
    "laguna-xs-2.1": _LAGUNA,
    "laguna-xs.2": _LAGUNA,
    "llama-3": "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|> <|eom_id|>",
    "minimax-m2": "]~!b[ ]~b] [e~[ <think> </think> <minimax:tool_call> </minimax:tool_call>",
    "nemotron-3": f"{_CHATML} {_THINK} {_RESPONSE}",
    "nemotron-3-ultra": f"{_CHATML} {_THINK} {_RESPONSE}",
    "prime-qwen3": f"{_CHATML} {_THINK} {_RESPONSE}",
    "qwen3": f"{_CHATML} {_THINK} {_RESPONSE}",
    "qwen3-vl": f"{_CHATML} {_THINK} {_RESPONSE} {_VISION}",
    "qwen3.5": f"{_CHATML} {_THINK} {_RESPONSE} {_VISION}",
    "qwen3.6": f"{_CHATML} {_THINK} {_RESPONSE} {_VISION}",
    "qwen3.8": f"{_CHATML} {_THINK} {_RESPONSE} {_VISION}",
}
NOT_COVERED: dict[str, str] = {
    "gpt-oss": "openai-harmony downloads its vocabulary at first use and accepts no other",
}

# Tags like <think> and <tool_call> are single tokens of the real vocabularies, but not special ones.
_TAG = re.compile(r"</?[a-z_:]+>")


def control_tokens(name: str) -> list[str]:
    return CONTROL[name].split()


def make_family(directory: Path, name: str) -> BaseModel:
    """A model directory (without weights) whose text side is of this family."""
    model = make_weightless_llama(directory)
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens(
        [
            AddedToken(token, special=_TAG.fullmatch(token) is None, normalized=False)
            for token in ([] if name == "hermes" else control_tokens(name))
        ]
    )
    tokenizer.save(str(path))
    return replace(model, renderer=name)
