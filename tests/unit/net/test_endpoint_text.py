"""What a user may write as URL and headers, and how they are shown again."""

from __future__ import annotations

import pytest

from app.net.endpoint import check_headers, check_url, hide_secrets, quote, show_url


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
    shown = quote(b"." * 285 + b" Bearer abcdefghijklmnop", "http://a/", {"Authorization": "Bearer abcdefghijklmnop"})
    assert "abc" not in shown
    assert hide_secrets("id=12 abcd", "http://a/", {"X": "12", "Y": "abcd"}) == "id=12 ***"
