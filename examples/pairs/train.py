"""Train the pairs agent: `python -m examples.pairs.train`, with the environment and options of `examples.shop.train`.

Does not cover: anything of its own; job, measurement and table are the shop's.
"""

from __future__ import annotations

import sys

from examples.pairs.data import pairs_task
from examples.shop.train import main

if __name__ == "__main__":
    sys.exit(main(pairs_task))
