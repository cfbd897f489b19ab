"""`python -m tests.chaos.supervisor JOB`: the real supervisor with the storm's faults around it.

Does not cover: any behaviour of its own; `workers.supervisor.main` does the work.
"""

from __future__ import annotations

import sys

from tests.chaos import faulty
from tests.chaos.orders import Orders

if __name__ == "__main__":
    faulty.spare_openai()
    faulty.supervisor(Orders.of_environment())
    from workers.supervisor import main

    sys.exit(main())
