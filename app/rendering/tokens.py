"""A model's tokenizer without transformers: `tokenizers` behind the interface that the `renderers` package asks for.

Does not cover: chat formats, and tokenizers without a `tokenizer.json`.
Text never becomes a control token: `<|im_end|>` in a row, a tool reply or a prompt is encoded as the characters it is
made of. Renderers write control tokens by id. (Added tokens that are not marked special, such as Qwen's
`<tool_call>`, are ordinary vocabulary to their own templates too and still match.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from app.rendering.protocol import NoRenderer

# `renderers.reasoning` looks for these headers in prompts by encoding them as text; they alone are read as control
# tokens.
HEADERS = (
    "<|im_start|>assistant\n",
    "<｜Assistant｜>",
    "<｜hy_Assistant:opensource｜>",
    "<|im_assistant|>assistant<|im_middle|>",
    "<assistant>",
    "]~b]ai\n",
)


class TextTokenizer:
    """Satisfies `renderers.Tokenizer`. Immutable after `build_renderer`, safe to share between threads."""

    def __init__(
        self, tokenizer: Tokenizer, *, name: str, eos_token: str | None = None, chat_template: str = ""
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.name_or_path = name
        self.chat_template = chat_template
        self.eos_token_id = None if eos_token is None else tokenizer.token_to_id(eos_token)
        # Never an id: SmolLM2 names <|endoftext|> as its unknown token, and renderers take "unknown" for "missing".
        self.unk_token_id: int | None = None
        tokenizer.encode_special_tokens = False
        self._headers = {text: tokenizer.encode(text, add_special_tokens=False).ids for text in HEADERS}
        tokenizer.encode_special_tokens = True

    @classmethod
    def load(cls, directory: Path, *, name: str) -> TextTokenizer:
        """Read tokenizer, end-of-text token and chat template of a model directory. Raises NoRenderer."""
        path = directory / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a missing or malformed file
            raise NoRenderer(f"{path}: cannot be read as a fast tokenizer ({error})") from error
        config = _json(directory / "tokenizer_config.json")
        eos = config.get("eos_token")
        template = config.get("chat_template")
        own = directory / "chat_template.jinja"
        if own.is_file():
            template = own.read_text(encoding="utf-8")
        return cls(
            tokenizer,
            name=name,
            eos_token=eos.get("content") if isinstance(eos, dict) else eos,
            chat_template=template if isinstance(template, str) else "",
        )

    def read_control_tokens(self, enabled: bool) -> None:
        """Whether text may contain control tokens: only for formats that cannot be written otherwise (`registry`)."""
        self._tokenizer.encode_special_tokens = not enabled

    def encode(self, text: str, *_: Any, **__: Any) -> list[int]:
        """Ids of text, without a leading or trailing token. Lone surrogates (JSON may carry them) become '?'."""
        if text in self._headers:
            return list(self._headers[text])
        clean = text.encode("utf-8", "replace").decode("utf-8")
        ids: list[int] = self._tokenizer.encode(clean, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int] | int, *_: Any, skip_special_tokens: bool = False, **__: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """The id of a token, None when the vocabulary lacks it; a list for a list."""
        if isinstance(tokens, str):
            return self._tokenizer.token_to_id(tokens)
        return [self._tokenizer.token_to_id(token) for token in tokens]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NoRenderer(f"{path}: not JSON ({error})") from error
    return value if isinstance(value, dict) else {}
