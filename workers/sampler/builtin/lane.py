"""The sequences of one weight version: who is admitted, what one step computes, who is finished.

A step is one forward pass over a flat row of tokens: one token of every decoding sequence plus prefill chunks up to a
budget, so that a long prompt never holds the others up.
Does not cover: whose turn it is among versions, and the thread (`engine`).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.sampler.builtin import attention, sampling
from workers.sampler.builtin.generation import EngineFault, Outcome
from workers.sampler.builtin.kv import Ids, PoolShelf, PrefixTree, Segment, SlotPool, common_prefix
from workers.sampler.builtin.running import Running, Seen

CHUNK_BUDGET = 512  # prefill tokens a step
SCORE_BUDGET = 128  # scored prompt tokens a step: each needs a row of logits over the vocabulary
ATTACH = 512  # rows x tokens from which attending a segment once beats copying it into every tail (0.1 us a token)
DETACH = 128
DEFER = 32  # tokens another prompt is about to put into the cache that are worth one step of waiting
BLOCK = 16  # slots per tail call when lengths differ much


@dataclass(frozen=True)
class StepReport:
    sampled: int
    ended: list[tuple[Running, Outcome | EngineFault]]  # for the engine to deliver
    prompt: int  # prompt tokens of the sequences admitted in this step, and how many of them the cache had
    cached: int


@dataclass(frozen=True)
class _Work:
    row: Running
    slot: int
    count: int


@dataclass(frozen=True)
class _Inputs:
    ids: Tensor  # [1, a bucket of tokens]
    positions: Tensor
    wanted: Tensor  # [a bucket] flat tokens whose logits are needed
    rows: int  # how many of `wanted` are


class Lane:
    def __init__(
        self, module: Any, shelf: PoolShelf, groups: int, eos: frozenset[int], *, max_rows: int, max_tokens: int
    ) -> None:
        """`max_tokens`: what all running sequences together may still hold; one sequence is always let in."""
        self.tree = PrefixTree(shelf.shape)
        self._sampler = sampling.Sampler()
        self.waiting: deque[Running] = deque()
        self.rows: list[Running] = []  # row i has slot i
        self.pool: SlotPool | None = None
        self._module, self._shelf, self._groups, self._eos = module, shelf, groups, eos
        self._shape = shelf.shape
        self._max_rows, self._max_tokens = max_rows, max_tokens

    @property
    def busy(self) -> bool:
        return bool(self.rows or self.waiting)

    @property
    def held(self) -> int:
        """Tokens that the running sequences keep in slots; may be read from any thread."""
        return sum(max(0, r.computed - r.tail_start) for r in list(self.rows))

    def cancel(self, row: Running) -> bool:
        """False when the sequence had finished already."""
        if row in self.waiting:
            self.waiting.remove(row)
        elif row in self.rows:
            self._remove(self.rows.index(row))
        else:
            return False
        return True

    def fail(self, fault: EngineFault) -> None:
        rows = [*self.rows, *self.waiting]
        self.rows, self.pool = [], None
        self.waiting.clear()
        for row in rows:
            row.finish(fault)

    def step(self) -> StepReport:
        """One forward pass."""
        admitted = self._admit()
        if admitted:
            self._attach()
        singles, chunks = self._choose()
        plan, inputs = self._plan(singles, chunks)
        with attention.step(plan):
            logits = self._module(
                input_ids=inputs.ids, position_ids=inputs.positions, use_cache=False, logits_to_keep=inputs.wanted
            ).logits[0, : inputs.rows]
        sampled, ended = self._advance([*singles, *chunks], logits)
        prompt = sum(r.prompt_length for r in admitted)
        return StepReport(sampled, ended, prompt, sum(r.cached for r in admitted))

    # --- admission ---

    def _admit(self) -> list[Running]:
        """Move waiting sequences into free slots, in order; one whose prompt is just being computed waits for it."""
        held = sum(len(r.ids) - r.tail_start for r in self.rows)
        admitted: list[Running] = []
        passed: list[Running] = []
        while self.waiting and len(self.rows) < self._max_rows:
            row = self.waiting.popleft()
            if row.generation.score_prompt:
                path: list[Segment] = []
            else:
                path = self.tree.match(row.ids, row.prompt_length - 1)
            row.computed = row.cached = path[-1].stop if path else 0
            need = len(row.ids) - row.computed
            if self.rows and held + need > self._max_tokens:
                self.waiting.appendleft(row)
                break
            if self._worth_waiting(row):
                passed.append(row)
                continue
            held += need
            row.fresh = True
            self.rows.append(row)
            admitted.append(row)
        self.waiting.extendleft(reversed(passed))
        return admitted

    def _worth_waiting(self, row: Running) -> bool:
        if row.generation.score_prompt:
            return False
        prompt = row.ids[: row.prompt_length - 1]
        return any(
            common_prefix(other.ids[: other.prompt_length], prompt) - row.computed >= DEFER
            for other in self.rows
            if other.prefilling and not other.generation.score_prompt
        )

    def _attach(self) -> None:
        """Decide anew which segments are attended in common, and bring every slot in line with that."""
        paths = [[] if r.generation.score_prompt else self.tree.walk(r.ids, r.computed) for r in self.rows]
        users = Counter(s for path in paths for s in path)
        starts: list[int] = []
        for row, path in zip(self.rows, paths, strict=True):
            keep = 0
            for i, s in enumerate(path):
                least = DETACH if s.stop <= row.tail_start else ATTACH
                if (users[s] - 1) * (s.stop - s.start) >= least:
                    keep = i + 1
            starts.append(keep)
        pool = self._pool(
            max(len(r.ids) - (p[k - 1].stop if k else 0) for r, p, k in zip(self.rows, paths, starts, strict=True))
        )
        for slot, (row, path, keep) in enumerate(zip(self.rows, paths, starts, strict=True)):
            start = path[keep - 1].stop if keep else 0
            if row.fresh:
                pool.fill(slot, start, path[keep:])
                row.fresh = False
            elif start != row.tail_start:
                pool.shift(slot, row.tail_start - start, row.computed - row.tail_start)
                if start < row.tail_start:
                    pool.fill(slot, start, row.attached)
            row.attached, row.tail_start = tuple(path[:keep]), start

    def _pool(self, capacity: int) -> SlotPool:
        if self.pool is None:
            self.pool = self._shelf.take()
        held = [0 if r.fresh else r.computed - r.tail_start for r in self.rows]
        self.pool.fit(len(self.rows), capacity, held[: self.pool.slots])
        return self.pool

    # --- one step ---

    def _choose(self) -> tuple[list[_Work], list[_Work]]:
        """Single-token rows first, in slot order, then the chunks."""
        singles: list[_Work] = []
        chunks: list[_Work] = []
        budget, scoring = CHUNK_BUDGET, SCORE_BUDGET
        for slot, row in enumerate(self.rows):
            left = row.length - row.computed
            if row.generation.score_prompt and row.prefilling:
                count = min(left, scoring)
                scoring -= count
            elif left == 1:
                singles.append(_Work(row, slot, 1))
                continue
            else:
                count = min(left, budget)
                budget -= count
            if count:
                chunks.append(_Work(row, slot, count))
        return singles, chunks

    def _plan(self, singles: Sequence[_Work], chunks: Sequence[_Work]) -> tuple[attention.StepPlan, _Inputs]:
        pool = self.pool
        assert pool is not None
        ids: list[Ids] = []
        positions: list[Ids] = []
        places: list[Ids] = []
        wanted: list[int] = []
        calls: list[attention.Chunk] = []
        flat = 0
        for i, w in enumerate((*singles, *chunks)):
            row, stop = w.row, w.row.computed + w.count
            at = np.arange(row.computed, stop)
            ids.append(row.ids[row.computed : stop])
            positions.append(at)
            places.append(at + (w.slot * self._shape.heads * pool.capacity - row.tail_start))
            if row.generation.score_prompt and row.prefilling:
                wanted.extend(range(flat, flat + w.count))
            elif stop == row.length:
                wanted.append(flat + w.count - 1)
            if i >= len(singles):
                mask = attention.chunk_mask(w.count, stop - row.tail_start, self._groups, self._shape.dtype)
                calls.append(attention.Chunk(flat, flat + w.count, w.slot, mask, row.attached))
            flat += w.count
        heads = np.arange(self._shape.heads)[:, None] * pool.capacity
        plan = attention.StepPlan(
            keys=pool.keys,
            values=pool.values,
            tokens=flat,
            write_index=torch.from_numpy((heads + np.concatenate(places)[None]).ravel()),
            blocks=self._blocks(singles),
            chunks=calls,
        )
        filler = np.zeros(bucket(flat) - flat, dtype=np.int64)
        return plan, _Inputs(
            torch.from_numpy(np.concatenate([*ids, filler]))[None],
            torch.from_numpy(np.concatenate([*positions, filler]))[None],
            torch.tensor([*wanted, *[0] * (bucket(len(wanted)) - len(wanted))], dtype=torch.long),  # may be empty
            len(wanted),
        )

    def _blocks(self, singles: Sequence[_Work]) -> list[attention.DecodeBlock]:
        """One padded block of all decoding rows, or blocks of a few where padding would cost more than it saves."""
        if not singles:
            return []
        lengths = np.array([w.row.computed + 1 - w.row.tail_start for w in singles])
        cuts = [(a, min(a + BLOCK, len(lengths))) for a in range(0, len(lengths), BLOCK)]
        if len(lengths) * lengths.max() <= 1.4 * sum((b - a) * lengths[a:b].max() for a, b in cuts):
            cuts = [(0, len(lengths))]
        return [_block(a, singles[a:b], torch.from_numpy(lengths[a:b])) for a, b in cuts]

    # --- after the step ---

    def _advance(
        self, work: Sequence[_Work], logits: Tensor
    ) -> tuple[int, list[tuple[Running, Outcome | EngineFault]]]:
        """Take in the step's result; returns how many tokens were sampled and the sequences that ended."""
        samplers: list[Running] = []
        sampled_at: list[int] = []
        at = 0
        for w in work:
            row, g = w.row, w.row.generation
            stop = row.computed + w.count
            if g.score_prompt and row.prefilling:
                targets = row.ids[row.computed + 1 : min(stop + 1, row.prompt_length)]
                if len(targets):
                    row.scores += self._sampler.score(logits[at : at + len(targets)], torch.from_numpy(targets))
                at += w.count
                if stop == row.length:
                    samplers.append(row)
                    sampled_at.append(at - 1)
            elif stop == row.length:
                samplers.append(row)
                sampled_at.append(at)
                at += 1
            was_prefilling = row.prefilling
            row.computed = stop
            if was_prefilling and not row.prefilling and not g.score_prompt and stop - row.cached > 1:
                self._remember(row, w.slot)
        if not samplers:
            return 0, []
        chosen = logits if sampled_at == list(range(len(logits))) else logits[sampled_at]
        draws = self._sampler.draw(chosen, [sampling.Row(r.generation, r.rng, Seen(r)) for r in samplers])
        ended: list[tuple[Running, Outcome | EngineFault]] = []
        for row, d in zip(samplers, draws, strict=True):
            if not np.isfinite(d.log_prob):
                ended.append((row, EngineFault("the model's output is not finite")))
                continue
            row.ids[row.length] = d.token
            row.length += 1
            row.log_probs.append(d.log_prob)
            end = row.ending(d.token, self._eos)
            if end is not None:
                ended.append((row, row.outcome(*end)))
        for row, result in ended:
            slot = self.rows.index(row)
            if isinstance(result, Outcome) and not row.generation.score_prompt:
                self._remember(row, slot)
            self._remove(slot)
        return len(samplers), ended

    def _remember(self, row: Running, slot: int) -> None:
        assert self.pool is not None
        n = row.computed - row.tail_start
        self.tree.insert(row.ids[: row.computed], row.tail_start, *self.pool.tail(slot, n))

    def _remove(self, slot: int) -> None:
        """Free a slot; the last sequence moves into it, so that slots stay without a gap."""
        last = self.rows.pop()
        if slot < len(self.rows):
            if not last.fresh and self.pool is not None:
                self.pool.move(len(self.rows), slot, last.computed - last.tail_start)
            self.rows[slot] = last
        if not self.rows and self.pool is not None:
            self._shelf.give(self.pool)
            self.pool = None


def bucket(rows: int) -> int:
    """The next of few sizes: oneDNN compiles and keeps a kernel, 0.1 to 0.3 MiB, for every number of rows it is given.

    Powers of two to 8, then multiples of 8, from 64 on eight sizes an octave: up to an eighth is computed for nothing.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length() if rows else 0
    size = max(8, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // size) * size


def _block(start: int, work: Sequence[_Work], lengths: Tensor) -> attention.DecodeBlock:
    slots = [w.slot for w in work]
    dense = slots == list(range(slots[0], slots[0] + len(slots)))
    members: dict[Segment, list[int]] = {}
    for i, w in enumerate(work):
        for segment in w.row.attached:
            members.setdefault(segment, []).append(i)
    return attention.DecodeBlock(
        start=start,
        stop=start + len(work),
        slots=slice(slots[0], slots[-1] + 1) if dense else torch.tensor(slots),
        mask=attention.tail_mask(lengths),
        width=max(w.row.tail_start for w in work),
        prefixes=[
            attention.SharedPrefix(s, None if len(rows) == len(work) else torch.tensor(rows))
            for s, rows in members.items()
        ],
        ragged=len({w.row.tail_start for w in work}) > 1,
    )
