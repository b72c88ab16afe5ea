"""The local web page of `tools/ask.py --serve`: drop pictures, ask, and see the answer while it is generated.

The page sends the whole conversation with each question, and the server keeps none of it. It needs
`pip install -e '.[serve]'`.

    GET  /       the page, in ask_page/
    GET  /about  {"model", "num_crops", "max_new_tokens"}
    POST /ask    {"turns": [{"images": [base64 of a file, …], "user": text, "assistant": text}, …]}: a line of JSON for
                 each piece of the answer to the last turn, {"text"}, and then {"answer"} or {"error"}. A wrong request
                 gets status 400, 403, 413 or 415 and {"error"}.
"""

import asyncio
import base64
import binascii
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from phi3v.console import tell
from phi3v.data.texts import check_text
from phi3v.errors import InputError

PAGE = Path(__file__).resolve().with_name("ask_page")
MOST_BYTES = 2**28  # of a request, which holds all images of its conversation
MOST_WAITING = 16  # questions, of which one is answered at a time
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Stopped(Exception):
    """The browser waits no longer for an answer."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for browsers. It is made before the model is loaded, so that a wrong address is said at once.

    Raises InputError if the address does not exist on this machine or another program has it.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as e:
        raise InputError(f"--host {host} --port {port}: {e.strerror or e}; give another --port or --host") from None


def is_local(address: str) -> bool:
    """Whether only programs on this machine can connect to an address, which is a number."""
    return ip_address(address.partition("%")[0]).is_loopback


def read_turns(body: bytes) -> list[dict]:
    """The turns in the body of a request, with each image as `open_image` takes it. Raises InputError."""
    try:
        turns = json.loads(body)["turns"]
        if not (isinstance(turns, list) and turns):
            raise InputError("there is no turn to answer")
        read, number = [], 0
        for i, turn in enumerate(turns, 1):
            images = []
            for content in turn["images"]:
                number += 1
                content = base64.b64decode(content, validate=True)
                images.append({"bytes": content, "path": None, "name": f"image {number}"})
            user, assistant = turn["user"], turn["assistant"]
            check_text(user, f"turn {i}: user")
            if assistant != "":  # an answer may be empty
                check_text(assistant, f"turn {i}: assistant")
            read.append({"images": images, "user": user, "assistant": assistant})
    except (KeyError, TypeError, UnicodeError, RecursionError, binascii.Error, json.JSONDecodeError) as e:
        raise InputError(f"the request is not a conversation ({type(e).__name__}: {e})") from None
    return [*read[:-1], read[-1] | {"assistant": ""}]


async def read_body(request: Request) -> bytes:
    """The body of a request that this server's own page, or a program on no page, has sent. Raises HTTPException."""
    # A page of another site can send requests to this machine too, but not with this type unless it is allowed to.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the content type must be application/json")
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if origin is not None and origin.partition("://")[2] != host:
        raise HTTPException(403, f"a page of {origin} may not ask")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"the images take more than {MOST_BYTES >> 20} MiB: begin a new conversation")
    return bytes(body)


def make_app(answer: Callable[[list[dict], Callable[[str], None]], str], about: dict, local: bool) -> Starlette:
    """The application that answers questions.

    answer: returns the answer to the last of the turns, and calls its second argument with each piece of it.
    about: what GET /about returns.
    local: answer only requests whose address is a name of this machine. Otherwise, a site could give its own name this
        machine's address, and its pages could ask.
    """
    worker, waiting = ThreadPoolExecutor(1), threading.Semaphore(MOST_WAITING)

    def start(turns: list[dict]) -> AsyncIterator[str]:
        loop, pieces, stopped = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def put(line: dict | None):
            loop.call_soon_threadsafe(pieces.put_nowait, line)

        def show(text: str):  # called for each token
            if stopped.is_set():
                raise Stopped
            if text:
                put({"text": text})

        def work():
            try:
                show("")
                put({"answer": answer(turns, show)})
            except Stopped:
                pass
            except InputError as e:
                put({"error": str(e)})
            except Exception as e:  # one question must not end the server
                tell(f"a question could not be answered: {e!r}", to_stderr=True)
                put({"error": f"the question could not be answered ({type(e).__name__}): see the terminal"})
            finally:
                waiting.release()
                put(None)

        async def lines():
            try:
                while (line := await pieces.get()) is not None:
                    yield json.dumps(line) + "\n"
            finally:  # also if the browser is gone
                stopped.set()

        worker.submit(work)
        return lines()

    async def ask(request: Request):
        try:
            turns = read_turns(await read_body(request))
        except InputError as e:
            raise HTTPException(400, str(e)) from None
        except ClientDisconnect:
            raise HTTPException(400, "the browser is gone") from None
        if not waiting.acquire(blocking=False):
            raise HTTPException(503, "too many questions wait for their answers: ask again later")
        return StreamingResponse(start(turns), media_type="application/x-ndjson", headers=HEADERS)

    async def error(_, e: HTTPException):
        return JSONResponse({"error": e.detail}, e.status_code, HEADERS)

    async def tell_about(_):
        return JSONResponse(about, headers=HEADERS)

    hosts = ["localhost", "127.0.0.1", "[::1]"] if local else ["*"]
    return Starlette(
        routes=[
            Route("/about", tell_about),
            Route("/ask", ask, methods=["POST"]),
            Mount("/", _Page(directory=PAGE, html=True)),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)],
        exception_handlers={HTTPException: error},
    )


class _Page(StaticFiles):
    def file_response(self, *args, **kwargs):
        response = super().file_response(*args, **kwargs)
        response.headers.update(HEADERS)
        return response


def serve(sock: socket.socket, answer: Callable, about: dict):
    """Answers questions until Ctrl-C. sock: from `listen`; answer, about: as for `make_app`."""
    address, port = sock.getsockname()[:2]
    local = is_local(address)
    tell(f"open http://{f'[{address}]' if ':' in address else address}:{port} in a browser; Ctrl-C ends the server")
    if not local:
        tell("everyone who can reach this address can ask: there is no password and no encryption", to_stderr=True)
    app = make_app(answer, about, local)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", server_header=False, timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[sock])
