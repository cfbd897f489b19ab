"""Ids to text: the tokenizer of the model's directory, and the search for stop strings while text grows.

Does not cover: rendering of messages, which the server's callers do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer


class Decoder(Protocol):
    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str: ...
    def piece(self, token: int) -> str: ...


class TokenizerFile:
    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""


class NoTokenizer:
    """A model directory without tokenizer.json: ids work, text is empty, stop strings are refused by `wire`."""

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        return ""

    def piece(self, token: int) -> str:
        return f"token_id:{token}"


def load_decoder(model: Path) -> Decoder:
    path = model / "tokenizer.json"
    return TokenizerFile(path) if path.exists() else NoTokenizer()


@dataclass(frozen=True)
class StopStrings:
    """Finds a stop string that the newest token completed, by decoding only as many tokens as one can span."""

    decoder: Decoder
    strings: tuple[str, ...]

    def find(self, completion: Sequence[int]) -> str | None:
        # Every byte of the string may be a token of its own; a few more tokens give the decoder its context.
        window = max(len(s.encode()) for s in self.strings) + 4
        text = self.decoder.decode(list(completion[-window:]), skip_special=True)
        hits = [(text.find(s), s) for s in self.strings if s in text]
        return min(hits)[1] if hits else None


def trim(text: str, stop: str) -> str:
    at = text.find(stop)
    return text if at < 0 else text[:at]
