"""What is said about errors of the Hub's client. test_hub.py makes a server fail and reads what is said about that."""

import errno
import ssl
import time
from email.utils import formatdate

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from phi3v.hub_faults import Fault, explain, refused, retry_after, without_password
from phi3v.old_versions import httpx

REQUEST = httpx.Request("GET", "https://hub.example/api/models/a/b")


@pytest.mark.parametrize(
    ("error", "what", "help", "passes"),
    [
        (
            httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate", request=REQUEST),
            "no encrypted connection to hub.example ([SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate)",
            "set SSL_CERT_FILE",
            False,
        ),
        (httpx.ConnectError("record layer failure", request=REQUEST), "no connection to hub.example", "", True),
        (
            httpx.ProxyError("407 Log in", request=REQUEST),
            "no connection to hub.example (407",
            "check HTTPS_PROXY",
            False,
        ),
        (httpx.ConnectTimeout("", request=REQUEST), "no answer from hub.example within 10 s", "", True),
        (httpx.ReadTimeout("", request=REQUEST), "no answer from hub.example within 10 s", "", True),
        (httpx.ReadError("[Errno 104] reset", request=REQUEST), "connection to hub.example broke off ([Err", "", True),
        (
            httpx.RemoteProtocolError("peer closed connection", request=REQUEST),
            "the connection to hub.example broke off (peer closed connection)",
            "",
            True,
        ),
        (
            httpx.LocalProtocolError("Illegal header value b'Bearer hf_x'"),
            "the token can't be sent",
            "HF_TOKEN",
            False,
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full", "set HF_HOME, now ", False),
        (OSError("Not enough free disk space to download the file."), "the disk is full", "free some space", False),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "the cache can't be written", "write to", False),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "the cache can't be written", "write to", False),
        (
            RuntimeError("Data processing error: CAS service error"),
            "RuntimeError: Data proc",
            "HF_HUB_DISABLE_XET=1",
            True,
        ),
        (KeyError("sha"), "the answer is not one of the Hub ('sha')", "HF_ENDPOINT", False),
        (MemoryError(), "MemoryError", "start again", True),
    ],
)
def test_what_is_said_about_an_error(error, what, help, passes):
    fault = explain(error)
    assert what in str(fault) and help in fault.help and fault.passes == passes
    assert bool(help) == bool(fault.help) and "hf_x" not in str(fault) + fault.help


def test_the_cause_of_an_error_is_what_counts():
    outer = LocalEntryNotFoundError("We cannot find the requested files.")
    outer.__cause__ = httpx.ConnectError("Connection refused", request=REQUEST)
    assert "Connection refused" in str(explain(outer))
    outer.__cause__.__cause__ = ssl.SSLError("wrong version number")
    assert "no encrypted connection" in str(explain(outer))
    outer.__cause__ = None
    outer.__context__ = Fault("said already")
    assert explain(outer) is outer.__context__


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "12"}, 12),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "-1"}, None),
        ({"RateLimit": '"api";r=0;t=30'}, 31),
        ({"RateLimit": '"api";r=3;t=30', "Retry-After": "2"}, 2),
    ],
)
def test_when_a_server_wants_to_be_asked_again(headers, seconds):
    assert retry_after(httpx.Headers(headers)) == seconds


def test_a_server_may_give_a_date():
    in_a_minute = {"Retry-After": formatdate(time.time() + 60, usegmt=True)}
    assert 55 < retry_after(in_a_minute) <= 61
    assert retry_after({"Retry-After": formatdate(0, usegmt=True)}) == 0


def test_a_wait_is_taken_from_429_and_503_alone():
    for status, wait in ((429, 9), (503, 9), (500, None), (408, None)):
        fault = refused(httpx.Response(status, headers={"Retry-After": "9"}, request=REQUEST))
        assert fault.wait == wait and fault.passes and f"hub.example answered {status}" in str(fault)
    assert not refused(httpx.Response(418, request=REQUEST)).passes


def test_addresses_are_shown_without_passwords():
    assert without_password("https://me:s3cret@hub.example:8/path?signature=1") == "https://hub.example:8/path"
    assert without_password("hub.example") == "hub.example"
