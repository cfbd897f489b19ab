"""An engine that remembers: it samples what a model of a family would write, and keeps every id that it saw or said.

Does not cover: probabilities. What it writes comes from the family's own render of one assistant message, or from the
same text spelled in other tokens, as a sampling model may.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from app.rendering import conversations
from app.rendering.protocol import ChatRenderer, Message, RenderingError
from app.samplers.client import Completion
from workers.rollouts.trajectory import TurnRequest

THINK, THOUGHT = "<think>", "Hm.\n</think>\n\n"


@dataclass(frozen=True)
class Said:
    """One call as the engine knows it."""

    prompt: list[int]
    sampled: list[int]


@dataclass
class Engine:
    """A `Policy` for one rollout. `spelled`: in single characters, and cut at the end of a call where that is known."""

    renderer: ChatRenderer
    tokenizer: Tokenizer
    script: Sequence[Message]
    spelled: bool
    log: list[Said] = field(default_factory=list)

    async def turn(self, request: TurnRequest) -> Completion:
        sampled = self._sample(self.script[len(self.log)])
        if self.spelled:
            sampled = [piece for token in sampled for piece in self._pieces(token)]
            if request.stop and sampled[-1] in self.renderer.stop_token_ids:
                sampled = sampled[:-1]  # the stop string came first
        self.log.append(Said(list(request.prompt_ids), sampled))
        return Completion(
            model="family-a1-v3",
            token_ids=tuple(sampled),
            log_probs=tuple(-0.5 - index / 64 for index in range(len(sampled))),
            text="",
            finish_reason="stop",
            stop_reason=None,
            prompt_tokens=len(request.prompt_ids),
            cached_tokens=None,
        )

    def extends(self, turn: int) -> bool:
        """Whether the prompt of this turn begins with everything the engine saw and said before."""
        before = self.log[turn - 1]
        history = before.prompt + before.sampled
        return self.log[turn].prompt[: len(history)] == history

    def _sample(self, message: Message) -> list[int]:
        """What a model writes after the opening of its turn to say this, to its end of turn.

        Where the format has no such text, the message is given what it needs: a thought when the turn opens one (which
        some formats then do not write into a history), and one call instead of two.
        """
        first = {**message, "tool_calls": list(message.get("tool_calls") or ())[:1]}
        thoughtless = {name: value for name, value in message.items() if name != "reasoning_content"}
        for forgets in (False, True):
            for said in (message, {**message, "reasoning_content": "Hm."}, first, thoughtless):
                try:
                    found = self._written(said, forgets=forgets)
                except RenderingError:
                    continue
                if found is not None:
                    return found
        raise AssertionError(f"no text of this format says {message}")

    def _written(self, message: Message, *, forgets: bool) -> list[int] | None:
        calls = message.get("tool_calls") or ()
        answers = [conversations.reply("0", number) for number in range(1, len(calls) + 1)]
        conversation = [conversations.ASK, message, *(answers or [conversations.ASK])]
        opened = self.renderer.prompt(conversation[:1], [conversations.LOOKUP])
        whole = self.renderer.prompt(conversation, [conversations.LOOKUP])
        if whole[: len(opened)] == opened:
            rest = whole[len(opened) :]
        else:  # what was opened ends inside a token
            before, after = self.renderer.decode(opened), self.renderer.decode(whole)
            unopened = before.rstrip().removesuffix(THINK)
            if after.startswith(before):
                written = after[len(before) :]
            elif forgets and unopened != before.rstrip() and after.startswith(unopened):
                written = THOUGHT + after[len(unopened) :]
            else:
                return None
            rest = self.tokenizer.encode(written, add_special_tokens=False).ids
        end = next((at for at, token in enumerate(rest) if token in self.renderer.stop_token_ids), None)
        return None if end is None else rest[: end + 1]

    def _pieces(self, token: int) -> list[int]:
        """A token of plain text as single bytes; a control token or tag as it is."""
        if token in self.tokenizer.get_added_tokens_decoder():
            return [token]
        found = [self.tokenizer.token_to_id(character) for character in self.tokenizer.id_to_token(token)]
        return [piece for piece in found if piece is not None]
