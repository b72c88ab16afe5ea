"""The page of `ask.py --serve`: its server answers the page's requests, and no others."""

import base64
import contextlib
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import uvicorn
from helpers import CHECKPOINT, ROOT
from PIL import Image

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.errors import InputError
from tools import ask, ask_server

JSON = {"Content-Type": "application/json"}


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 90)).save(file, "PNG")
    return file.getvalue()


def turn(user, *images, assistant=""):
    return {"images": [base64.b64encode(image).decode() for image in images], "user": user, "assistant": assistant}


@contextlib.contextmanager
def served(answer, local=True):
    """The port of a server in a thread."""
    sock = ask_server.listen("127.0.0.1", 0)
    app = ask_server.make_app(answer, {"model": "a model", "num_crops": 1, "max_new_tokens": 9}, local)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def request(port, path="/ask", turns=None, body=None, method="POST", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"turns": turns}) if body is None and method == "POST" else body
    connection.request(method, path, body, (JSON if method == "POST" else {}) | headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def asked(port, *turns):
    response, content = request(port, turns=list(turns))
    assert response.status == 200, content
    return [json.loads(line) for line in content.splitlines()]


@pytest.fixture(scope="module")
def echo():
    """A server whose model repeats its last question word by word."""

    def answer(turns, show):
        for word in turns[-1]["user"].split():
            show(word + " ")
        return turns[-1]["user"]

    with served(answer) as port:
        yield port


def test_the_answer_of_a_model_arrives_in_pieces():
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT).eval()
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT)
    image = {"bytes": picture(), "path": None}
    first = [{"images": [image], "user": "What digit is this?", "assistant": ""}]
    wanted = ask.answer(model, processor, first, 12, lambda text: None)
    second = [first[0] | {"assistant": wanted}, {"images": [image], "user": "And this?", "assistant": ""}]
    wanted_second = ask.answer(model, processor, second, 12, lambda text: None)
    with served(lambda turns, show: ask.answer(model, processor, turns, 12, show)) as port:
        *pieces, last = asked(port, turn("What digit is this?", picture()))
        assert last == {"answer": wanted} and wanted
        assert "".join(piece["text"] for piece in pieces).strip() == wanted
        again = asked(port, turn("What digit is this?", picture(), assistant=wanted), turn("And this?", picture()))
        assert again[-1] == {"answer": wanted_second}
        (error,) = asked(port, turn("What digit is this?", b"no image"))
        assert error["error"].startswith("image 1 can't be read as an image")
        assert asked(port, turn("What digit is this?", picture()))[-1] == {"answer": wanted}


def test_the_page_and_its_files_forbid_everything_from_elsewhere(echo):
    for path, kind in (("/", "text/html"), ("/page.js", "javascript"), ("/page.css", "text/css")):
        response, content = request(echo, path, method="GET")
        assert response.status == 200 and kind in response.headers["content-type"] and content
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert b"http://" not in content and b"https://" not in content
    assert request(echo, "/about", method="GET")[1] == b'{"model":"a model","num_crops":1,"max_new_tokens":9}'
    for path in ("/ask.py", "/../ask.py", "/..%2fask.py", "//etc/passwd", "/%2fetc/passwd"):
        assert request(echo, path, method="GET")[0].status == 404, path


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (400, "{", "JSONDecodeError"),
        (400, "[]", "TypeError"),
        (400, b"\xff", "UnicodeDecodeError"),
        (400, "[" * 100_000, "RecursionError"),
        (400, '{"turns": []}', "no turn"),
        (400, '{"turns": [{"user": "a", "assistant": ""}]}', "'images'"),
        (400, '{"turns": [{"images": ["?"], "user": "a", "assistant": ""}]}', "Error"),
        (400, '{"turns": [{"images": [7], "user": "a", "assistant": ""}]}', "TypeError"),
        (400, '{"turns": [{"images": [], "user": 7, "assistant": ""}]}', "turn 1: user is 7"),
        (400, '{"turns": [{"images": [], "user": " ", "assistant": ""}]}', "turn 1: user"),
        (400, '{"turns": [{"images": [], "user": "a<|end|>", "assistant": ""}]}', "turn 1: user holds '<|end|>'"),
        (400, '{"turns": [{"images": [], "user": "a", "assistant": "<|image_1|>"}]}', "turn 1: assistant holds"),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(echo, status, body, said):
    response, content = request(echo, body=body)
    assert response.status == status and said in json.loads(content)["error"]


def test_pages_of_other_sites_cannot_ask(echo):
    question = [turn("hello")]
    own = f"http://127.0.0.1:{echo}"
    assert request(echo, turns=question, Origin=own)[0].status == 200
    assert request(echo, turns=question, Origin="http://site.example")[0].status == 403
    assert request(echo, turns=question, Origin="null")[0].status == 403
    assert request(echo, turns=question, **{"Content-Type": "text/plain"})[0].status == 415
    for host in ("site.example", f"site.example:{echo}"):  # a name that leads to this machine
        for path, method in (("/", "GET"), ("/about", "GET"), ("/ask", "POST")):
            assert request(echo, path, question, method=method, Host=host)[0].status == 400
    response, _ = request(echo, method="OPTIONS", Origin="http://site.example")
    assert "access-control-allow-origin" not in response.headers
    with served(lambda turns, show: "yes", local=False) as port:  # --host 0.0.0.0: any name is right
        assert request(port, turns=question, Host="gpu7.example")[0].status == 200
        assert request(port, turns=question, Origin="http://site.example")[0].status == 403


def test_a_request_beyond_the_limit_is_refused(echo, monkeypatch):
    monkeypatch.setattr(ask_server, "MOST_BYTES", 2**20)
    response, content = request(echo, turns=[turn("a", b"0" * 2**20)])
    assert response.status == 413 and "new conversation" in json.loads(content)["error"]
    assert asked(echo, turn("a", b"0" * 2**19))[-1] == {"answer": "a"}


def test_an_answer_ends_when_the_browser_is_gone():
    shown, ended = threading.Event(), threading.Event()

    def answer(turns, show):
        if turns[-1]["user"] == "short":
            return "done"
        try:
            for _ in range(10_000):
                show("word ")
                shown.set()
                time.sleep(0.01)
        finally:
            ended.set()

    with served(answer) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/ask", json.dumps({"turns": [turn("long")]}), JSON)
        assert connection.getresponse().read(10) and shown.wait(10)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        assert asked(port, turn("short")) == [{"answer": "done"}]  # it had to wait for the long one to end
        assert ended.is_set()


def test_questions_wait_for_one_another():
    at_once, most = [0], [0]

    def answer(turns, show):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.1)
        at_once[0] -= 1
        return turns[-1]["user"]

    with served(answer) as port, ThreadPoolExecutor(4) as browsers:
        found = list(browsers.map(lambda i: asked(port, turn(f"question {i}")), range(4)))
    assert found == [[{"answer": f"question {i}"}] for i in range(4)] and most[0] == 1


def test_too_many_questions_are_refused(monkeypatch):
    monkeypatch.setattr(ask_server, "MOST_WAITING", 1)
    begun, go = threading.Event(), threading.Event()

    def answer(turns, show):
        begun.set()
        go.wait(20)
        return "yes"

    with served(answer) as port, ThreadPoolExecutor(1) as browser:
        first = browser.submit(asked, port, turn("first"))
        assert begun.wait(20)
        response, content = request(port, turns=[turn("second")])
        go.set()
        assert response.status == 503 and "ask again later" in json.loads(content)["error"]
        assert first.result() == [{"answer": "yes"}]
        assert asked(port, turn("third")) == [{"answer": "yes"}]


def test_an_error_of_one_question_does_not_end_the_server(capsys):
    def answer(turns, show):
        if turns[-1]["user"] == "wrong":
            raise InputError("too long")
        if turns[-1]["user"] == "broken":
            raise ZeroDivisionError("division by zero")
        return "fine"

    with served(answer) as port:
        assert asked(port, turn("wrong")) == [{"error": "too long"}]
        assert "ZeroDivisionError" in asked(port, turn("broken"))[0]["error"]
        assert asked(port, turn("right")) == [{"answer": "fine"}]
    assert "ZeroDivisionError('division by zero')" in capsys.readouterr().err


def test_wrong_addresses_and_flags_are_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr(ask, "load", lambda args: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, said in (
            (["--serve", "--port", port], f"--port {port}: Address already in use"),
            (["--serve", "--host", "no.such.name.invalid"], "--host no.such.name.invalid"),
            (["--serve", "--port", "70000"], "--port 70000"),
            (["--serve", "--question", "a"], "--serve: give images and questions on its page"),
            (["--serve", "cat.jpg"], "--serve: give images and questions on its page"),
            (["--port", "80", "--question", "a"], "--port has no effect without --serve"),
        ):
            with pytest.raises(InputError, match=said):
                ask.main([str(CHECKPOINT), *flags])
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "tools.ask_server")
    monkeypatch.delattr("tools.ask_server")
    with pytest.raises(InputError, match=r"--serve needs uvicorn: pip install -e '.\[serve\]'"):
        ask.main([str(CHECKPOINT), "--serve"])


def test_which_addresses_are_local():
    assert all(map(ask_server.is_local, ("127.0.0.1", "127.0.0.2", "::1")))
    assert not any(map(ask_server.is_local, ("0.0.0.0", "::", "192.168.0.7", "fe80::1%eth0")))


@pytest.mark.slow
def test_ctrl_c_ends_the_server():
    command = [sys.executable, str(ROOT / "tools/ask.py"), str(CHECKPOINT), "--serve", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = process.stdout.readline()
    assert said.startswith("open http://127.0.0.1:") and said.endswith("in a browser; Ctrl-C ends the server\n")
    port = int(said.split(":")[2].split()[0])
    assert asked(port, turn("What digit is this?", picture()))[-1]["answer"]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
