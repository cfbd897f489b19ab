"""A storm of faults over a whole installation, and a checker of what must hold afterwards (docs/chaos.md).

`python -m tests.chaos --database sqlite --jobs 60 --faults 300 --seed 1`; the short form is `test_storm.py`.
Does not cover: faults of a user's tools and graders (tests/e2e), nor a wrong policy (tests/contract/proof).
"""
