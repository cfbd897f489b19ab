"""Signatures against the specification's own test vector. Does not cover: requests (`test_delivery`)."""

from __future__ import annotations

import base64

from app.webhooks import signing


def test_the_specifications_example_is_signed_as_it_says() -> None:
    made = signing.headers(
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330.9,
        b'{"test": 2432232314}',
        ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"],
    )
    assert made == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_each_secret_gives_a_signature_of_its_own() -> None:
    secrets = [signing.new_secret(), signing.new_secret()]
    both = signing.headers("evt_1", 1.0, b"{}", secrets)["webhook-signature"]
    assert both.split() == [signing.headers("evt_1", 1.0, b"{}", [one])["webhook-signature"] for one in secrets]
    assert {len(base64.b64decode(one.removeprefix("whsec_"))) for one in secrets} == {32}
