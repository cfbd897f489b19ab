"""The bucket of a key: full at first, filled by time, and no other key's."""

from __future__ import annotations

import pytest

from app.security.rates import RateLimits, duration


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_granted_and_the_next_request_waits_for_time() -> None:
    clock = Clock()
    limits = RateLimits(per_minute=60, burst=3, clock=clock)
    assert [limits.take("a").remaining for _ in range(3)] == [2, 1, 0]
    refused = limits.take("a")
    assert (refused.granted, refused.wait_s, refused.reset_s) == (False, 1.0, 3.0)
    clock.now += 1.0
    assert limits.take("a").granted
    assert not limits.take("a").granted


def test_refused_requests_do_not_push_the_next_one_away() -> None:
    clock = Clock()
    limits = RateLimits(per_minute=60, burst=1, clock=clock)
    limits.take("a")
    for _ in range(10):
        clock.now += 0.0625
        assert not limits.take("a").granted
    clock.now += 0.375
    assert limits.take("a").granted


def test_an_idle_key_saves_no_more_than_a_burst() -> None:
    clock = Clock()
    limits = RateLimits(per_minute=600, burst=2, clock=clock)
    limits.take("a")
    clock.now += 3600
    assert [limits.take("a").granted for _ in range(3)] == [True, True, False]


def test_keys_do_not_share_a_bucket() -> None:
    limits = RateLimits(per_minute=1, burst=1, clock=Clock())
    assert limits.take("a").granted
    assert limits.take("b").granted
    assert not limits.take("a").granted


@pytest.mark.parametrize(("seconds", "written"), [(0.017, "17ms"), (1.5, "1.5s"), (2, "2s"), (360, "6m0s")])
def test_a_time_until_reset_is_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds) == written
