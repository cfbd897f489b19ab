"""The ranks of one update as each of them sees the others: messages from rank 0 to all, sums over all.

Does not cover: how the other processes are started and ended (`workers.trainer.ranks`).

Ranks meet through a file and talk over the loopback interface: one host. The group is ours and not accelerate's, which
takes each rank for a run of its own: no wrapper, and no collective inside the loss, so ranks may differ in how many
micro-batches they have. An update has one sum over ranks, of the adapter's gradients, at its end.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from workers.messages import Message

T = TypeVar("T")
# A rank waits here for the next step as long as rollouts take; a rank that dies takes the others with it by the leash.
PATIENCE = timedelta(days=30)


class UnsupportedLaunch(Exception):
    """Ranks that cannot work together, or a launcher of another library around us."""


class RanksDiverged(Exception):
    """The ranks hold different adapters although all applied the same gradient."""


class World:
    """Rank `rank` of `size`. Alone, every method is the identity."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, rank: int, size: int, rendezvous: Path) -> World:
        """Wait until all ranks have met at the file `rendezvous`."""
        if size == 1:
            return cls()
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # by default the host's name is looked up, which need not resolve
        cuda = torch.cuda.is_available()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=FileStore(str(rendezvous), size),
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
        world = cls(rank, size)
        devices = world.gather(str(torch.cuda.get_device_properties(0).uuid) if cuda else "cpu")
        if (cuda and len(set(devices)) < size) or (not cuda and set(devices) != {"cpu"}):
            raise UnsupportedLaunch(f"{size} ranks need a GPU each, or none at all; they have {devices}")
        return world

    def share(self, value: object) -> Any:
        """Rank 0's value, on every rank."""
        box: list[Any] = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        everything: list[Any] = [None] * self.size
        dist.all_gather_object(everything, value)
        return everything

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over ranks: one exchange of a flat fp32 vector, the same bits on all."""
        if self.size == 1:
            return
        flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def leave(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


class Channel(Protocol):
    """What a session needs of the pipe."""

    def receive(self) -> Message: ...

    def send(self, message: Message) -> None: ...


class LeaderChannel:
    """Rank 0's pipe: what it hears all hear."""

    def __init__(self, pipe: Channel, world: World) -> None:
        self._pipe, self._world, self.send = pipe, world, pipe.send

    def receive(self) -> Message:
        message: Message = self._world.share(self._pipe.receive())
        return message


class FollowerChannel:
    """The other ranks' pipe: they hear what rank 0 hears, and nobody hears them."""

    def __init__(self, world: World) -> None:
        self._world = world

    def receive(self) -> Message:
        message: Message = self._world.share(None)
        return message

    def send(self, message: Message) -> None:
        pass
