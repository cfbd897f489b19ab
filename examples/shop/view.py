"""What the terminal shows while a job runs: a live panel with `rich` on a terminal, else plain lines.

Does not cover: the result; tables are printed by `examples.shop.report`.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import Group

BARS = "▁▂▃▄▅▆▇█"
PLAIN_EVERY_S = 20.0


@dataclass
class Frame:
    """One look at a running job. `events` are those not shown before, oldest first."""

    job_id: str
    status: str
    step: int = 0
    total_steps: int = 0
    rewards: Sequence[float] = ()
    tool_calls: Sequence[float] = ()
    valid_rewards: Sequence[float] = ()
    activity: str = ""
    activity_age_s: float = 0.0
    ledger: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    events: Sequence[str] = ()


class View(Protocol):
    def show(self, frame: Frame) -> None: ...

    def count(self, label: str, done: int, total: int) -> None: ...


def sparkline(values: Sequence[float], top: float | None = None) -> str:
    """One bar per value, from 0 to `top` (default: the largest value)."""
    ceiling = max([*values, 1e-9]) if top is None else top
    return "".join(BARS[min(7, max(0, int(8 * value / ceiling)))] for value in values)


def bar(done: int, total: int, width: int) -> str:
    """`━━━╌╌╌`."""
    filled = width * done // max(1, total)
    return "━" * filled + "╌" * (width - filled)


def age(seconds: float) -> str:
    """`7 s`, `2 min 05 s`."""
    whole = int(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def ledger_line(ledger: Mapping[str, int]) -> str:
    """`started 96 = trained 60 + no_signal 4 + open 32`: the states sum to the number started."""
    total = sum(ledger.values())
    parts = [f"{'open' if state == 'started' else state} {count}" for state, count in ledger.items() if count]
    return f"started {total}" + (" = " + " + ".join(parts) if parts else "")


class PlainView:
    """A line per event, and every 20 s where it stands."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def show(self, frame: Frame) -> None:
        for event in frame.events:
            print(f"  [{age(frame.seconds)}] {event}", flush=True)
        if frame.events or time.monotonic() - self._last < PLAIN_EVERY_S:
            return
        self._last = time.monotonic()
        step = f"step {frame.step}/{frame.total_steps}, " if frame.total_steps else ""
        now = f"now: {frame.activity} · {age(frame.activity_age_s)}" if frame.activity else "now: waiting"
        print(f"  [{age(frame.seconds)}] {frame.status}, {step}{now}; {ledger_line(frame.ledger)}", flush=True)

    def count(self, label: str, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._last > PLAIN_EVERY_S:
            self._last = time.monotonic()
            print(f"  {label}: {done} of {total} episodes", flush=True)


class RichView:
    """A panel redrawn in place; everything a model or a service wrote goes in as text, never as markup."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._events: list[str] = []
        self._live = Live(console=Console(), refresh_per_second=4, transient=False)
        self._live.start()

    def close(self) -> None:
        self._live.stop()

    def show(self, frame: Frame) -> None:
        self._events = [*self._events, *frame.events][-5:]
        self._live.update(panel(frame, self._events))

    def count(self, label: str, done: int, total: int) -> None:
        from rich.text import Text

        self._live.update(Text(f"  {label:<16}  {bar(done, total, 30)}  {done}/{total} episodes"))


def panel(frame: Frame, events: Sequence[str]) -> Group:
    """The job as a person wants it: where it is, what it learned, what it does now and for how long."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    rows = Table.grid(padding=(0, 2, 0, 0))
    for name, values, top in (
        ("reward train", frame.rewards, 1.0),
        ("reward valid", frame.valid_rewards, 1.0),
        ("tool calls", frame.tool_calls, None),
    ):
        if values:
            gain = f"{values[-1] - values[0]:+.2f}" if len(values) > 1 else ""
            rows.add_row(Text(name, style="dim"), Text(sparkline(values, top)), Text(f"{values[-1]:.2f}"), Text(gain))
    now = f"{frame.activity} · {age(frame.activity_age_s)}" if frame.activity else "waiting"
    return Group(
        Panel(
            Group(
                bar(frame.step, frame.total_steps, 60),
                rows,
                Text(f"rollouts      {ledger_line(frame.ledger)}", style="dim"),
                *(Text(event, style="dim") for event in events),
            ),
            title=Text(f"{frame.job_id}  {frame.status}  step {frame.step}/{frame.total_steps or '?'}"),
            subtitle=Text(age(frame.seconds)),
        ),
        Text(f" now  {now}", style="bold"),
    )


@contextmanager
def open_view() -> Iterator[View]:
    """The best view this terminal can show."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        yield PlainView()
        return
    view = RichView()
    try:
        yield view
    finally:
        view.close()
