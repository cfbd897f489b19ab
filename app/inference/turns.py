"""What the model wrote, read: one sampled completion becomes one choice.

Does not cover: the wire (`answer`). Pure and slow for long answers, so the service runs it in a thread.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.core.ids import new_id
from app.inference.request import Ask
from app.inference.schemas import ChoiceLogprobs, TokenLogprob, ToolCallOut
from app.rendering.protocol import ChatRenderer, ParsedCall, ParsedTurn
from app.samplers.client import Completion

UNDECODABLE = "\ufffd"


@dataclass(frozen=True)
class Choice:
    """One answer. `content` is None only beside tool calls; `errors` says why calls were not valid."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCallOut, ...]
    errors: tuple[str, ...]
    finish_reason: str
    logprobs: ChoiceLogprobs | None
    completion_tokens: int


def read_turn(renderer: ChatRenderer, ask: Ask, prompt_ids: list[int], completion: Completion) -> Choice:
    """Parse the sampled ids. A call that is not valid stays in the content as written: nobody loses sight of it."""
    turn = renderer.parse(completion.token_ids, ask.tools, prompt_ids)
    valid = [call for call in turn.calls if call.error is None] if ask.tools else []
    shown = [call for call in turn.calls if call not in valid]
    content = _content(turn, shown)
    if isinstance(completion.stop_reason, str) and completion.stop_reason in ask.stop:
        # Its tokens are among the sampled ones; the hosted API does not show the stop sequence.
        content = content.partition(completion.stop_reason)[0]
    calls = tuple(_call_out(call) for call in valid)
    return Choice(
        content=None if calls and not content.strip() else content,
        reasoning=turn.reasoning,
        tool_calls=calls,
        errors=tuple(call.error for call in turn.calls if call.error is not None) if ask.tools else (),
        finish_reason="length" if completion.finish_reason == "length" else "tool_calls" if calls else "stop",
        logprobs=_logprobs(renderer, completion) if ask.logprobs else None,
        completion_tokens=len(completion.token_ids),
    )


def _content(turn: ParsedTurn, shown: list[ParsedCall]) -> str:
    return "\n".join(part for part in (turn.content, *(call.raw for call in shown)) if part)


def _call_out(call: ParsedCall) -> ToolCallOut:
    return {
        "id": new_id("call_"),
        "type": "function",
        "function": {"name": call.name or "", "arguments": call.arguments},
    }


def _logprobs(renderer: ChatRenderer, completion: Completion) -> ChoiceLogprobs:
    """One entry per sampled token, the end-of-turn token excepted: it is not part of the message."""
    pairs = list(zip(completion.token_ids, completion.log_probs, strict=True))
    if pairs and pairs[-1][0] in renderer.stop_token_ids:
        pairs.pop()
    content = []
    for token_id, logprob in pairs:
        text = renderer.decode([token_id])
        entry: TokenLogprob = {
            "token": text,
            "logprob": logprob,
            "bytes": None if UNDECODABLE in text else list(text.encode()),
            "top_logprobs": [],
        }
        content.append(entry)
    return {"content": content, "refusal": None}
