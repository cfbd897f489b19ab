"""Storms in which one thing that the design rests on is missing: the checker must see it, and say what it saw.

Does not cover: what each takes away (`faulty`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tests.chaos.faults import Climate
from tests.chaos.storm import Plan

# What each must be found out by: at least one of these figures is above 0.
TELLTALES: Mapping[str, tuple[str, ...]] = {
    "fence": ("stale", "double"),
    "directory": ("changed", "changed_snapshots"),
    "late_ack": ("stolen", "reopened"),
}
CALM_S = 60.0  # its jobs may never end


def mutated(plan: Plan, mutation: str) -> Plan:
    """With the faults that the missing thing is there for, and little else."""
    plan = replace(plan, mutation=mutation, calm_s=CALM_S)
    if mutation == "late_ack":
        return replace(plan, climate=Climate({"doubled_ring": 6, "kill_trainer": 1}))
    if mutation == "fence":
        return replace(plan, climate=Climate({"freeze": 6, "kill_trainer": 1}))
    # Long enough that the next attempt writes the same checkpoint before this one would be ended as a leftover.
    return replace(plan, climate=Climate({"freeze_writing": 1}), lease_s=30.0)
