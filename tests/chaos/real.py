"""The storm with nothing of its own but the faults: the real trainer, the built-in engine and a tiny model.

Does not cover: a model that learns: its answers are noise, and the grader looks for a letter that half of them hold.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.chaos.faults import STORM, Climate
from tests.chaos.installation import MODEL
from tests.chaos.storm import Plan

# The trainer takes no orders: its disk is never full. Of 30 faults, three or four kill the engine.
WEIGHTS = {**STORM, "kill_engine": 15, "kill_door": 3}
GAP_S = (3.0, 9.0)  # an attempt needs ten seconds to import torch before there is anything to disturb
LEASE_S = 8.0


def planned(plan: Plan, root: Path) -> Plan:
    """Makes the model. Slow: it imports torch."""
    from tests.tiny import make_tiny_llama

    models = root / "models"
    make_tiny_llama(models / MODEL)
    climate = Climate(WEIGHTS, gap_s=GAP_S, trainer="workers.trainer", engine="workers.sampler.builtin")
    return replace(plan, models=models, climate=climate, answer="e", lease_s=LEASE_S)
