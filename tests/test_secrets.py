"""Passwords, tokens and keys do not appear in messages, logs, settings and reports."""

import subprocess
import sys
import time

import pytest
from bad_texts import HEX, LONG, NO_SECRETS, ORDINARY_NAMES, SECRET_NAMES, SECRETS
from helpers import environment, parse_command
from html_pages import report

import finetune_hf_trainer_ucf101 as script
from phi3v.console import say
from phi3v.errors import InputError
from phi3v.secrets import masked_command, without_secrets, without_secrets_in
from phi3v.training.settings import check_settings
from tools import ask
from tools import convert_conversations as convert_tool
from tools import merge_adapter as merge_tool


def test_secrets_are_masked(tmp_path):
    token = "hf_abcdefghijklmnopqrstuvwx"
    html, page = report(
        tmp_path,
        summary={
            "command": f"HF_TOKEN=s3cret1 torchrun --hub_token s3cret2 --wandb-key='s3cret3 b' '--password=s3cret4 c' "
            f'--max_new_tokens 64 --url https://me:s3cret5@host/x {token} --config \'{{"token": "s3cret6"}}\'',
            "env": {"API_KEY": "s3cret7", "nested": {"password": 1234567, "list": [{"secret": "s3cret8"}]}},
            "credentials": {"user": "s3cret9"},
            "note": f"uses {token}",
            "settings": {"max_new_tokens": 64, "include_tokens_per_second": "no", "hub_token": None},
            "versions": {"tokenizers": "0.23.1"},
        },
    )
    assert "s3cret" not in html and token not in html and "1234567" not in html
    assert "--max_new_tokens 64 --url https://•••@host/x •••" in page.text and "max_new_tokens 64" in page.text
    assert "include_tokens_per_second no" in page.text and "hub_token None" in page.text and "0.23.1" in page.text
    forms = "github_pat_s3cretab xoxb-s3cret-abc https://h/a?X-Amz-Signature=s3cret&b=1 https://h/a?se=1&sig=s3cret"
    assert "s3cret" not in report(tmp_path, summary={"command": f"train.py {forms}"})[0]
    listed = report(tmp_path, summary={"command": ["train.py", "--hub_token", "it's s3cret", "--password=s3cret b"]})
    assert "s3cret" not in listed[0]


TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (f"401 for {TOKEN}", "401 for •••"),
        (f"me/model@{TOKEN}: no such revision", "me/model@•••: no such revision"),
        ("Illegal header value b'Bearer abc def'", "Illegal header value b'Bearer ••• def'"),
        ("proxy http://me:s3cret@proxy:3128 refused", "proxy http://•••@proxy:3128 refused"),
        ("hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29w.x-y", "•••"),
        # Names of files and repositories stay readable.
        ("/data/hf_datasets/train.jsonl:7", "/data/hf_datasets/train.jsonl:7"),
        ("hf://datasets/nielsr/docvqa@0123abc/data", "hf://datasets/nielsr/docvqa@0123abc/data"),
        ("/models/hf_phi35vision/config.json", "/models/hf_phi35vision/config.json"),
    ],
)
def test_messages_keep_everything_but_secrets(text, masked):
    assert without_secrets(text) == masked
    assert str(InputError(text)) == masked


@pytest.mark.parametrize("kind", SECRETS)
def test_tokens_of_known_services_are_masked(kind):
    text, secret = SECRETS[kind]
    assert secret in text and secret not in without_secrets(text) and "•••" in without_secrets(text)
    assert secret not in masked_command(text) and secret not in str(InputError(text))
    assert secret not in masked_command(["train.py", "--note", text, text])


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_only_looks_like_a_secret_stays(text):
    assert without_secrets(text) == text and masked_command(text) == text


def test_values_are_masked_by_their_names():
    for name in SECRET_NAMES:
        for text in (
            f"{name}=s3cret",
            f"{name}='s3cret a'",
            f"'{name}=s3cret a'",
            f'"{name}": "s3cret"',
            f"{name}: s3cret",
        ):
            assert "s3cret" not in masked_command(text), text
            assert "s3cret" not in masked_command(text[:-1]), text  # cut off
        if name.startswith("--"):
            shown = masked_command(["train.py", name, "it's s3cret", "--seed", "1"])
            assert "s3cret" not in shown and shown.endswith("--seed 1")
            assert "s3cret" not in masked_command(str(["train.py", name, "s3cret", "--seed", "1"]))
    for name in ORDINARY_NAMES:
        assert masked_command(f"{name} 16 {name}=16") == f"{name} 16 {name}=16"
    assert masked_command("--max_new_tokens 16 --tokens=1.5e3") == "--max_new_tokens 16 --tokens=1.5e3"


@pytest.mark.parametrize("text", LONG)
def test_masking_takes_time_in_proportion_to_the_length(text):
    start = time.process_time()
    masked_command(LONG[text])
    assert time.process_time() - start < 3  # 0.1 s of a processor's time, whatever else it does


def test_passwords_in_netrc_are_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {HEX}\n")
    assert without_secrets(f"run {HEX}, {HEX[::-1]}") == f"run •••, {HEX[::-1]}"
    (tmp_path / "netrc").write_text("machine\n")
    assert without_secrets(f"run {HEX}") == f"run {HEX}"


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"])
def test_values_of_secret_variables_are_masked_in_whatever_form_they_have(variable, monkeypatch):
    monkeypatch.setenv(variable, "my own word\n")
    assert without_secrets("illegal header: my own word") == "illegal header: •••"
    monkeypatch.setenv(variable, "short")
    assert without_secrets("a short text") == "a short text"


def test_the_stored_token_is_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert without_secrets("a stored one") == "a stored one"
    (tmp_path / "token").write_text("stored one\n")
    assert without_secrets("a stored one") == "a •••"


def test_say_masks(capsys):
    say(f"output     /tmp/{TOKEN}")
    assert capsys.readouterr().out == "output     /tmp/•••\n"


def test_settings_of_checkpoints_hold_no_secret():
    nested = {"deepspeed": {"comet": {"api_key": "s3cret", "enabled": True}}, "paths": [f"/x/{TOKEN}", "/y"], "n": 1}
    masked = {"deepspeed": {"comet": {"api_key": "•••", "enabled": True}}, "paths": ["/x/•••", "/y"], "n": 1}
    assert without_secrets_in(nested) == masked
    with pytest.raises(InputError, match="n: 1 then, 2 now") as error:
        check_settings(nested, masked | {"n": 2}, "checkpoint", anyway=False)
    assert "comet" not in str(error.value)  # a checkpoint of an earlier version may hold the secret itself


PROGRAM = f"""
import logging, sys, warnings
from phi3v.errors import exit_on_input_error

def main():
    logging.getLogger("library").error("sent %s to %s", "{TOKEN}", "the Hub")
    warnings.warn("{TOKEN} is old")
    raise ValueError("{TOKEN} is wrong")

exit_on_input_error(main)
"""


@pytest.mark.slow
def test_logs_warnings_and_tracebacks_are_masked(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 1 and "sent ••• to the Hub" in run.stderr and "UserWarning: ••• is old" in run.stderr
    assert "Traceback" in run.stderr and run.stderr.endswith("ValueError: ••• is wrong\n")
    # A traceback shows lines of the program, so the program's own text is masked there too.
    assert TOKEN not in run.stderr + run.stdout


PARSERS = {
    "script": lambda flags: parse_command(script, ["--data_dir", "x", *flags]),
    "ask": lambda flags: ask.parse_arguments(["model", *flags]),
    "merge": lambda flags: merge_tool.main(["adapter", "merged", *flags]),
    "convert": lambda flags: convert_tool.main(["--source", "x", "--out_dir", "y", *flags]),
}


@pytest.mark.parametrize("program", PARSERS)
@pytest.mark.parametrize("flags", [["--token", TOKEN], ["--token", "s3cret"], [f"--hf-token={TOKEN}"]])
def test_wrong_flags_do_not_echo_their_values(program, flags):
    with pytest.raises(InputError, match="unrecognized arguments: .*•••") as error:
        PARSERS[program](flags)
    assert TOKEN not in str(error.value) and "s3cret" not in str(error.value)
