"""What went wrong when the Hugging Face Hub was asked, in words, and what helps."""

import contextlib
import errno
import ssl
import time
import urllib.request
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from .old_versions import httpx

TIMEOUT = 10.0  # seconds to wait for an answer


class Fault(Exception):
    """The Hub could not be read. The text says what happened.

    help: what to do, if it is something else than fetching the files elsewhere.
    wait: the number of seconds after which the server wants to be asked again, if it says so.
    passes: whether another attempt can succeed.
    """

    def __init__(self, what: str, help: str = "", wait: float | None = None, passes: bool = False):
        super().__init__(what)
        self.help, self.wait, self.passes = help, wait, passes


def without_password(url: str) -> str:
    """An address without the user and the password that it may hold, and without what follows the path."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.netloc else url


def refused(response: httpx.Response) -> Fault:
    """For an answer whose status is an error."""
    status, host = response.status_code, response.request.url.host
    if status == 429:
        help = "start again in some minutes: the Hub limits the requests of an address, and allows more with HF_TOKEN"
        return Fault(f"{host} answered 429, too many requests", help, retry_after(response.headers), passes=True)
    if status == 408 or status >= 500:
        wait = retry_after(response.headers) if status == 503 else None
        return Fault(f"{host} answered {status} {response.reason_phrase}".strip(), wait=wait, passes=True)
    try:
        hf_raise_for_status(response)
    except HfHubHTTPError as e:
        return explain(e)
    return Fault(f"{host} answered {status}")


def retry_after(headers) -> float | None:
    """The number of seconds after which a server wants to be asked again; None if it does not say."""
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        return limit.reset_in_seconds + 1
    value = headers.get("Retry-After", "").strip()
    if value.isdigit():
        return int(value)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def explain(error: BaseException) -> Fault:
    """What an exception of huggingface_hub or of its HTTP client means."""
    causes = list(_causes(error))
    is_tls = any(isinstance(cause, ssl.SSLError) for cause in causes)
    # huggingface_hub often raises an error of its own, which says less than its cause.
    error = next((cause for cause in causes if isinstance(cause, (Fault, httpx.RequestError, HfHubHTTPError))), error)
    if isinstance(error, Fault):
        return error
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, HfHubHTTPError):
        return _explain_answer(error)
    if isinstance(error, (httpx.RequestError, httpx.InvalidURL)):
        return _explain_network(error, text, is_tls)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) or "enough free disk space" in text:
        return Fault(f"the disk is full ({text})", f"free some space, or set HF_HOME, now {constants.HF_HOME}")
    if isinstance(error, OSError) and error.errno:
        help = f"set HF_HOME, now {constants.HF_HOME}, to a folder that you may write to"
        return Fault(f"the cache can't be written ({text})", help)
    if "Consistency check failed" in text:
        return Fault(f"a file arrived incomplete ({text.partition(': ')[2].partition('. ')[0]})", passes=True)
    if isinstance(error, (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError)):
        help = "check HF_ENDPOINT, and whether a login page or a proxy is in between"
        return Fault(f"the answer is not one of the Hub ({text})", help)
    help = "start again; HF_HUB_DISABLE_XET=1 downloads large files in another way"
    return Fault(f"{type(error).__name__}: {text}", help, passes=True)


def _causes(error: BaseException | None):
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _explain_answer(error: HfHubHTTPError) -> Fault:
    """For a status with which a server refuses a request for good."""
    response = error.response
    status, host = response.status_code, response.request.url.host
    said = " ".join((error.server_message or response.reason_phrase or "").split())
    token = "set HF_TOKEN to a token that may read it, which `hf auth login` can also store"
    if isinstance(error, RevisionNotFoundError):
        return Fault("it has no such revision", "give a branch, a tag or a commit that it has")
    if isinstance(error, GatedRepoError) or status == 403:
        return Fault(f"access is restricted ({status} {said})", f"accept its terms on its page of the Hub, and {token}")
    if isinstance(error, RepositoryNotFoundError) or status == 401:
        help = f"check the name; if it is private or gated, {token}"
        return Fault(f"there is no such repository, or it is private ({status} {said})", help)
    if status == 407:
        return Fault(f"the proxy answered {status} {said}", "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY")
    return Fault(f"{host} answered {status} {said}".strip(), "check HF_ENDPOINT, and whether a proxy is in between")


def _explain_network(error: httpx.RequestError | httpx.InvalidURL, text: str, is_tls: bool) -> Fault:
    """For a request that had no answer."""
    try:
        url = error.request.url
    except (RuntimeError, AttributeError):
        url = httpx.URL(constants.ENDPOINT)
    place, proxy_help = url.host or str(url), "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.host):
        place = f"{place} through the proxy {without_password(proxy)}"
    else:
        proxy = None
    if isinstance(error, httpx.LocalProtocolError) and "header" in text:
        return Fault("the token can't be sent", "check HF_TOKEN: it holds characters that no token has")
    if isinstance(error, (httpx.UnsupportedProtocol, httpx.InvalidURL)):
        return Fault(
            f"{without_password(constants.ENDPOINT)} is no address", "check HF_ENDPOINT and the proxy variables"
        )
    if is_tls or "SSL" in text or "CERTIFICATE" in text:
        help = "check that HF_ENDPOINT and the proxies begin with the right one of http and https"
        if "CERTIFICATE" in text:
            help = "if your network has its own certificate, set SSL_CERT_FILE to it; also check HF_ENDPOINT"
        return Fault(f"no encrypted connection to {place} ({text})", help)
    if isinstance(error, httpx.ProxyError):
        return Fault(f"no connection to {place} ({text})", proxy_help)
    if isinstance(error, httpx.TimeoutException):
        seconds = error.request.extensions.get("timeout", {}).get("read") or TIMEOUT
        return Fault(f"no answer from {place} within {seconds:g} s", proxy_help if proxy else "", passes=True)
    if isinstance(error, httpx.ConnectError):
        return Fault(f"no connection to {place} ({text})", proxy_help if proxy else "", passes=True)
    return Fault(f"the connection to {place} broke off ({text})", passes=True)
