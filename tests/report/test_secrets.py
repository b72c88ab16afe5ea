"""Passwords, tokens and keys do not appear in a report."""

from html_pages import report


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
