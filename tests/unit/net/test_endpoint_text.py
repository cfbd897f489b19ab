"""What a user may write as URL and headers, and how they are shown again."""

from __future__ import annotations

import base64
import json
from html import escape
from urllib.parse import quote_plus

import pytest

from app.net.endpoint import Mask, check_headers, check_url, quote, show_url


@pytest.mark.parametrize("url", ["http://127.0.0.1:8765/call", "https://tools.example/a?b=c", "http://[::1]:80/"])
def test_a_plain_http_url_is_kept(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://a/", "http://"),
        ("file:///etc/passwd", "http://"),
        ("a.example/x", "http://"),
        ("http://", "no host"),
        ("http://u:pa55word@a/", "headers"),
        ("http://a:99999/", "valid"),
        ("http://a:0/", "port 0"),
        ("http://0177.0.0.1/", "valid"),
        ("http://a/ b", "white space"),
        ("http://a/\r\nX: y", "white space"),
        ("http://a/" + "x" * 3000, "longer"),
    ],
)
def test_a_faulty_url_is_refused_without_being_repeated(url: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        check_url(url)
    assert "pa55word" not in str(error.value)


@pytest.mark.parametrize(
    "headers",
    [
        {"Bad Name": "s3cr3t"},
        {"X": "s3cr3t\r\nY: 1"},
        {"X": "s3cr3t-é"},
        {"Host": "s3cr3t"},
        {"transfer-encoding": "s3cr3t"},
        {"X-A": "s3cr3t", "x-a": "s3cr3t"},
        {"X": "s3cr3t" * 2000},
    ],
)
def test_a_header_that_breaks_the_request_is_refused_without_its_value(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        check_headers(headers)
    assert "s3cr3t" not in str(error.value)


def test_a_url_is_shown_without_what_may_be_secret() -> None:
    assert show_url("https://u:p@a.example:1/x?key=1#f") == "https://a.example:1/x?…"


def test_secrets_are_masked_before_the_text_is_cut() -> None:
    mask = Mask.of({"Authorization": "Bearer abcdefghijklmnop"})
    assert "abc" not in quote(b"." * 285 + b" Bearer abcdefghijklmnop", mask)


def test_a_short_value_goes_as_a_word_and_a_very_short_one_stays() -> None:
    mask = Mask.of({"X": "12", "Y": "prod"})
    assert mask("id=12 prod, production") == "id=12 ***, production"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("Bearer s3cr3t-value", "I know s3cr3t-value"),
        ("session=s3cr3t-value; theme=dark", "your session: s3cr3t-value"),
        (f"Basic {base64.b64encode(b'me:s3cr3t-value').decode()}", "welcome me, s3cr3t-value"),
        ('Digest user="me", response="s3cr3t-value"', json.dumps({"headers": 'response="s3cr3t-value"'})),
        ("s3cr3t/value==", json.dumps("s3cr3t/value==").replace("/", "\\/")),
        ("s3cr3t<value>", escape("you sent s3cr3t<value>")),
        ("s3cr3t/value", quote_plus("s3cr3t/value")),
        ('s3cr3t"value', json.dumps('s3cr3t"value')),
    ],
)
def test_a_secret_is_found_as_servers_repeat_it(value: str, said: str) -> None:
    shown = Mask.of({"Authorization": value})(said)
    assert "s3cr3t" not in shown
    assert "***" in shown


def test_what_every_request_says_is_no_secret() -> None:
    text = "train needs application/json"
    assert Mask.of({"X-Split": "train", "Content-Type": "application/json"})(text) == text


def test_masks_add_up_and_reach_every_text_of_a_json_value() -> None:
    mask = Mask.of({"A": "first-secret"}) | Mask.of(url="http://a/?key=second%2Fsecret")
    value = {"a": ["first-secret", {"key first-secret": "second/secret"}], "n": 1.5, "none": None}
    assert mask.value(value) == {"a": ["***", {"key ***": "***"}], "n": 1.5, "none": None}
    assert "secret" not in repr(mask)
