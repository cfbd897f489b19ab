"""Lognormal latencies given by what people know of a tool: its mean and its 99th percentile.

Does not cover: who waits for them (`tool_server`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

Z99 = 2.3263478740408408  # the normal distribution's 99 % quantile


class ImpossibleLatency(Exception):
    """No lognormal distribution has this mean and this p99."""


@dataclass(frozen=True)
class Lognormal:
    """exp(N(mu, sigma²)) seconds; `mu` -inf answers at once."""

    mu: float
    sigma: float

    @classmethod
    def of(cls, mean_s: float, p99_s: float) -> Lognormal:
        """mean = exp(mu + sigma²/2), p99 = exp(mu + z sigma): the smaller of the two sigmas that solve it.

        Mean 1 s and p99 10 s give sigma 1.43 and a median of 0.36 s.
        """
        if mean_s == 0:
            return cls(-math.inf, 0.0)
        distance = math.log(p99_s / mean_s) if p99_s >= mean_s > 0 else math.nan
        root = Z99**2 - 2 * distance
        if math.isnan(root) or root < 0:
            raise ImpossibleLatency(f"mean {mean_s} s and p99 {p99_s} s: p99 must be 1 to 14.9 times the mean")
        sigma = Z99 - math.sqrt(root)
        return cls(math.log(mean_s) - sigma**2 / 2, sigma)

    def draw(self, rng: random.Random) -> float:
        return rng.lognormvariate(self.mu, self.sigma) if self.mu > -math.inf else 0.0
