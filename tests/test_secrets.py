"""Texts that count as secrets when input is refused or output is masked, and texts that do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.secrets import MASK, find_secret, scrub, scrub_json

# Made up, and written in two parts, so that no scanner takes this file for a leak.
TOKENS = {
    "a Hugging Face token": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "an API key": "sk-" + "proj-abcdefghijklmnopqrstuvwxyz0123456789",
    "an AWS access key": "AKIA" + "IOSFODNN7EXAMPLE",
    "a GitHub token": "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789",
    "a GitLab token": "glpat-" + "abcdefghij0123456789",
    "a Slack token": "xoxb-" + "123456789012-abcdefghijkl",
    "a Google key": "AIza" + "SyA1234567890abcdefghijklmnopqrstuvw",
    "a Weights & Biases key": "wandb_v1_" + "abcdefghijklmnopqrstuvwxyz",
    "a package index token": "pypi-" + "AgEIcHlwaS5vcmc" * 4,
    "a signed token": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijklmnop",
    "a private key": "-----BEGIN RSA "
    + "PRIVATE KEY-----\nMIIEow\nabc\n-----END RSA PRIVATE KEY-----",
    "a URL with a password": "s3://me:" + "hunter22@host/folder",
}
NO_SECRETS = (
    "pad_token: <pad>, eos_token=</s>, num_tokens: 123456789, hf_transfer, hf_hub_download",
    "task-1_060_completion_8_auto_gemma-2-9b, risk-abcdefghijklmnopqrstuvwxyz",
    "revision: 8d7a8f2c1b9e4f6a7c5d3e2f1a0b9c8d7e6f5a4b",
    "https://me@host/a:b@c, http://localhost:8080/@me, ssh://git@github.com:22/x",
    "TOKENIZERS_PARALLELISM=false KEY=1",
)


@pytest.mark.parametrize("kind", TOKENS)
def test_a_token_is_found_by_its_shape_and_masked(kind: str) -> None:
    token = TOKENS[kind]
    for text in (token, f"see {token}, or", f"key='{token}'", f"--header={token}\n"):
        found = find_secret(text, {})
        assert found is not None and found[0] == kind and token not in found[0]
        assert text[found[1] :].startswith(token.partition("://")[2].partition("@")[0] or token)
        assert (
            token not in scrub(text, {})
            and "hunter22" not in scrub(text, {})
            and MASK in scrub(text, {})
        )


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert find_secret(text, {}) is None and scrub(text, {}) == text


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "MYSQL_PWD",
        "AZURE_STORAGE_CONNECTION_STRING",
    ]
    + ["my_secret", "SLURM_JWT_TOKEN", "OPENAI_APIKEY", "SSH_PASSPHRASE", "GITHUB_PAT", "DB_PASS"],
)
def test_the_value_of_a_variable_that_names_a_secret_is_masked_in_every_form(name: str) -> None:
    value = 'pä55/"word"+\\1x'
    environment = {name: value, "HOME": "/home/me"}
    printed = (
        value,
        json.dumps(value),
        json.dumps({"a": [value]}, ensure_ascii=False),
        repr(value),
    )
    for text in printed:
        assert "word" not in scrub(f"at {text} in /home/me", environment)
        assert "/home/me" in scrub(f"at {text} in /home/me", environment)
    assert scrub("u?p=p%C3%A455%2F%22word%22%2B%5C1x", environment) == f"u?p={MASK}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PWD", "/home/somebody"),
        ("OLDPWD", "/home/somebody"),
        ("TOKENIZERS_PARALLELISM", "disabled"),
        ("HF_TOKEN_PATH", "/home/somebody/token"),
        ("SSH_ASKPASS", "/usr/bin/ask-it"),
        ("KEYBOARD", "qwertyqwerty"),
        ("API_KEY", "short"),
        ("XDG_SESSION_TYPE", "something"),
    ],
)
def test_a_variable_that_holds_no_secret_is_left_alone(name: str, value: str) -> None:
    assert scrub(f"is {value}", {name: value}) == f"is {value}"


def test_a_path_to_a_secret_is_none(tmp_path: Path) -> None:
    environment = {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path)}
    assert scrub(f"reads {tmp_path}", environment) == f"reads {tmp_path}"
    assert scrub(f"reads {tmp_path}/x", {"A_TOKEN": f"{tmp_path}/x"}) == f"reads {MASK}", (
        "no such file"
    )


def test_what_stands_behind_the_name_of_a_secret_is_masked() -> None:
    for text in (
        "password=abcdefgh1",
        "{'aws_secret_access_key': 'abcdefgh1'}",
        "AccountKey=abcdefgh1;EndpointSuffix",
        "Authorization: Bearer abcdefgh1abcdefgh1",
        "https://host/x?X-Amz-Signature=abcdefgh1&y=1",
    ):
        assert "abcdefgh1" not in scrub(text, {}), text
        assert find_secret(text, {}) is None, "a prompt may say so"


def test_a_recipe_may_not_hold_the_value_of_a_secret_variable() -> None:
    environment = {
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "API_KEY": "too-short",
    }
    assert find_secret("tags: [0123456789abcdef0123456789abcdef01234567]", environment) == (
        "the value of the environment variable WANDB_API_KEY",
        7,
    )
    assert find_secret("too-short", environment) is None


def test_a_short_value_does_not_uncover_the_end_of_a_longer_one() -> None:
    assert scrub("abcdefghijkl", {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefghijkl"}) == MASK


def test_json_is_scrubbed_by_keys_and_by_texts() -> None:
    value = {
        "hub_token": "anything",
        "hub_private": True,
        "a": [TOKENS["an API key"], {"key": "x", "n": 1}],
        "t": None,
    }
    assert scrub_json(value, {}) == {
        "hub_token": MASK,
        "hub_private": True,
        "a": [MASK, {"key": MASK, "n": 1}],
        "t": None,
    }


@settings(max_examples=40, deadline=None)
@given(st.text(), st.text(min_size=8), st.text())
def test_no_text_around_a_value_keeps_it(before: str, value: str, after: str) -> None:
    environment = {"MY_TOKEN": value}
    scrubbed = scrub(before + value + after, environment)
    assert scrub(scrubbed, environment) == scrubbed or value in MASK * 9
    assert value not in scrubbed or value.strip("*") == ""


@pytest.mark.parametrize(
    "piece",
    ["a:", "://", "://a:", "-eyJ", "eyJa.", "-----BEGIN ", "password ", "sk-", "hf_", "Bearer "],
)
def test_no_text_takes_long(piece: str) -> None:
    """Bounded repeats: a log of repeated beginnings is not searched once per beginning."""
    assert isinstance(scrub(piece * (200_000 // len(piece)), {}), str)
