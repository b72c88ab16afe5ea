"""Models and data sets are fetched once, checked, and read offline; faults of the Hub end in one clear line.

The fixture `reachable` lets this process read the Hub of tests/loopback_hub.py. The slow tests start processes.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow.parquet as pq
import pytest
import torch
from helpers import CHECKPOINT, ROOT
from hub_repositories import CAULDRON, MINI, MODEL, OLDER_MODEL
from huggingface_hub import constants
from loopback_hub import Fault, LoopbackHub
from safetensors.torch import load_file
from two_ranks import TwoRanks

from phi3v import Phi3VConfig, Phi3VForCausalLM, Phi3VProcessor, hub
from phi3v.data.tables import ROW, load_table, undecoded
from phi3v.errors import InputError
from tools import ask, merge_adapter


def use(server: LoopbackHub, home: Path, monkeypatch):
    """Makes this process read `server`, with an empty cache in `home`, as if it had been started so."""
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agents.json"))
    monkeypatch.setattr(huggingface_hub.utils._detect_agent, "_registry", {})
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.endpoint)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    monkeypatch.setattr(hub, "OFFLINE_ASKED_FOR", False)
    monkeypatch.setattr(hub, "hub_is_down", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("HF_TOKEN", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.fixture
def reachable(hub, tmp_path, monkeypatch):  # noqa: F811
    """The Hub that this process reads, with an empty cache. Waits between attempts are noted in `waits`."""
    use(hub, tmp_path / "home", monkeypatch)
    hub.waits = []
    monkeypatch.setattr("phi3v.hub.time", SimpleNamespace(sleep=hub.waits.append))
    huggingface_hub.utils.close_session()
    yield hub
    huggingface_hub.utils.close_session()


def fails(fetch, *arguments) -> str:
    """The message of the InputError, which must be one line."""
    with pytest.raises(InputError) as error:
        fetch(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def own_copy(server: LoopbackHub, folder: Path, *repositories: str) -> Path:
    """Lets the server serve a copy of some repositories, which a test may change. Returns the copy of the first."""
    for repository in repositories:
        shutil.copytree(server.root / repository, folder / repository)
    server.root = folder
    return folder / repositories[0]


# ---- What is fetched


def test_a_model_is_fetched_once_and_read_offline(reachable):
    folder = hub.fetch_model(MODEL)
    assert folder.name == reachable.commit(MODEL)
    fetched = reachable.fetched()
    assert set(fetched.values()) == {1}
    names = {name.removeprefix(f"{MODEL}/") for name in fetched}
    assert names == {path.name for path in folder.iterdir()}
    assert "model-00002-of-00002.safetensors" in names and not [name for name in names if name.endswith((".py", ".md"))]
    reachable.requests.clear()
    for name in (MODEL, str(folder)):
        assert Phi3VConfig.from_pretrained(name).hidden_size == 128
        assert Phi3VProcessor.from_pretrained(name).image_processor.num_crops == 4
        assert Phi3VForCausalLM.from_pretrained(name).num_parameters() > 0
    assert not reachable.requests
    assert hub.fetch_model(MODEL) == folder
    assert [record["path"] for record in reachable.requests] == [f"/api/models/{MODEL}/revision/main"]


def test_weights_of_other_kinds_and_other_folders_stay_there(reachable, tmp_path):
    model = own_copy(reachable, tmp_path / "root", f"models/{MODEL}")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "training_args.bin"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("not needed")
    hub.fetch_model(MODEL)
    assert not [
        name for name in reachable.fetched() if name.endswith((".bin", "consolidated.safetensors", "onnx/config.json"))
    ]


def test_without_weights(reachable):
    folder = hub.fetch_model(OLDER_MODEL, weights=False)
    assert not [name for name in reachable.fetched() if name.endswith(".safetensors")]
    assert Phi3VConfig.from_pretrained(folder).rope_parameters["rope_type"] == "longrope"
    assert Phi3VProcessor.from_pretrained(OLDER_MODEL).image_processor.num_crops == 16


def test_weights_in_one_file(reachable, tmp_path):
    model = own_copy(reachable, tmp_path / "root", f"models/{MODEL}")
    for path in model.glob("model*"):
        path.unlink()
    assert "has no weights in safetensors" in fails(hub.fetch_model, MODEL)
    shutil.copy(CHECKPOINT / "model.safetensors", model)
    assert (hub.fetch_model(MODEL) / "model.safetensors").is_file()


def test_a_revision_is_fetched(reachable, tmp_path):
    model = own_copy(reachable, tmp_path / "root", f"models/{MODEL}")
    shutil.copytree(model, f"{model}@v2")
    (tmp_path / "root" / "models" / f"{MODEL}@v2" / "README.md").write_text("changed")
    v2 = hub.fetch_model(MODEL, weights=False, revision="v2")
    assert v2.name == reachable.commit(MODEL, revision="v2") != reachable.commit(MODEL)
    assert hub.fetch_model(MODEL, weights=False, revision=v2.name) == v2
    assert "@v3 can't be fetched" in (said := fails(hub.fetch_model, MODEL, False, "v3")) and "no such revision" in said


def test_one_configuration_of_a_data_set_is_fetched(reachable):
    folder = hub.fetch_data(CAULDRON, "docvqa")
    fetched = reachable.fetched()
    assert len([name for name in fetched if "/docvqa/train-" in name]) == 14 and len(fetched) == 15
    assert (folder / "README.md").is_file() and set(fetched.values()) == {1}


@pytest.mark.parametrize(("repo", "config", "split"), [(MINI, None, "test"), (CAULDRON, "nlvr2", "train[500:]")])
def test_the_hub_a_copy_of_it_and_datasets_alone_give_the_same_rows(repo, config, split, reachable, tmp_path):
    expected = datasets.load_dataset(repo, config, split=split)
    from_hub = load_table(repo, config, split, None, {})
    reachable.requests.clear()
    shutil.copytree(reachable.root / "datasets" / repo, tmp_path / repo.split("/")[1])
    from_copy = load_table(repo, config, split, str(tmp_path), {})
    part = (
        tmp_path / "part" / repo.split("/")[1]
    )  # a copy of this configuration alone, as `hf download --include` makes
    shutil.copytree(tmp_path / repo.split("/")[1], part, ignore=shutil.ignore_patterns("clevr", "docvqa", "websight"))
    from_part = load_table(repo, config, split, str(part.parent), {})
    assert not reachable.requests
    for table in (from_hub, from_copy, from_part):
        assert {name: table.features[name] for name in expected.features} == expected.features
        plain = expected.with_format("arrow")[:].to_pylist()
        assert table.select_columns(expected.column_names).with_format("arrow")[:].to_pylist() == plain
    assert from_hub[ROW][:2] == ([500, 501] if config else [0, 1])


def test_a_split_or_a_configuration_that_is_not_there(reachable):
    assert "has no split 'test', only train" in fails(load_table, CAULDRON, "nlvr2", "test[:3]", None, {})
    assert "(chartqa) has no split 'train' on the Hub" in fails(load_table, CAULDRON, "chartqa", "train", None, {})


def test_missing_parts_of_a_copy_are_named(reachable, tmp_path):
    shutil.copytree(reachable.root / "datasets" / CAULDRON, tmp_path / "the_cauldron")
    for number in (3, 5):
        next((tmp_path / "the_cauldron" / "nlvr2").glob(f"train-0000{number}-*")).unlink()
    said = fails(load_table, CAULDRON, "nlvr2", "train", str(tmp_path), {})
    assert "lacks nlvr2/train-00003-of-00017, nlvr2/train-00005-of-00017" in said


# ---- Only the first rank of a node


def test_the_other_ranks_of_a_node_read_the_cache(reachable, monkeypatch):
    folder, table = hub.fetch_model(MODEL), load_table(MINI, None, "train", None, {})
    reachable.requests.clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")
    assert hub.fetch_model(MODEL) == folder
    assert load_table(MINI, None, "train", None, {})["id"] == table["id"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", constants.HF_HUB_CACHE + "-of-another-machine")
    assert "is not, or not completely, in the cache" in fails(hub.fetch_model, MODEL)
    assert not reachable.requests


# ---- Faults: what is said, how often it is tried

UNREACHABLE = (
    f"try again later, set HF_ENDPOINT to a mirror, or run `hf download {MODEL}` where the Hub can be reached, and set "
    "HF_HUB_OFFLINE=1 and HF_HOME here"
)
FAULTS = {
    "error of the server": (Fault(".*", status=500), "127.0.0.1 answered 500 Internal Server Error; " + UNREACHABLE, 3),
    "bad gateway": (Fault(".*", status=502), "127.0.0.1 answered 502 Bad Gateway; " + UNREACHABLE, 3),
    "not available": (Fault(".*", status=503), "127.0.0.1 answered 503 Service Unavailable; " + UNREACHABLE, 3),
    "too many requests": (Fault(".*", status=429), "answered 429, too many requests; start again in some minutes", 3),
    "reset": (Fault(".*", reset=True), "Connection reset by peer", 3),
    "not found": (
        Fault(".*", status=404, code="RepoNotFound", message="Repository not found"),
        "there is no such repository, or it is private (404 Repository not found); check the name; if it is private or",
        1,
    ),
    "no token": (
        Fault(".*", status=401, code="RepoNotFound", message="Invalid username or password."),
        "there is no such repository, or it is private (401 Invalid username or password.); check the name; if it",
        1,
    ),
    "wrong token": (Fault(".*", status=401, message="Invalid credentials"), "set HF_TOKEN to a token that may read", 1),
    "gated": (
        Fault(".*", status=403, code="GatedRepo", message="Access to model is restricted"),
        "access is restricted (403 Access to model is restricted); accept its terms on its page of the Hub, and set",
        1,
    ),
    "forbidden": (Fault(".*", status=403, message="Forbidden"), "access is restricted (403 Forbidden)", 1),
    "bad request": (Fault(".*", status=400, message="Nothing here"), "answered 400 Nothing here; check HF_ENDPOINT", 1),
    "proxy": (Fault(".*", status=407, message="Log in"), "the proxy answered 407 Log in; check HTTPS_PROXY", 1),
    "login page": (Fault(".*", status=200, body="<html>Log in"), "the answer is not one of the Hub", 1),
    "other JSON": (Fault(".*", status=200, body="{}"), "the answer is not one of the Hub", 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_first_request(name, reachable):
    fault, message, attempts = FAULTS[name]
    reachable.faults.append(fault)
    said = fails(hub.fetch_model, MODEL)
    assert said.startswith(f"{MODEL} can't be fetched from {reachable.endpoint}: ") and message in said
    assert len(reachable.requests) == attempts and len(reachable.waits) == attempts - 1
    assert "set HF_HOME" not in said


@pytest.mark.parametrize("what", ["model-00002.*safetensors", "tokenizer.json", "train-00003-of-00017"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"status": 500}, "answered 500 Internal Server Error"),
        ({"status": 403, "message": "Expired"}, "access is restricted (403 Expired)"),
        ({"status": 404}, "answered 404"),
        ({"reset": True}, "Connection reset by peer"),
        ({"short": 100}, "a file arrived incomplete (file should be of size"),
        ({"status": 200, "body": "<html>Log in"}, "a file arrived incomplete (file should be of size"),
        ({"corrupt": True}, "as its hash is not the Hub's: run `rm /"),
    ],
)
def test_a_fault_while_a_file_is_read(what, options, message, reachable):
    reachable.faults.append(Fault(f"GET /(cdn|api/resolve-cache).*{what}", **options))
    if "train" in what:
        said, name = fails(load_table, CAULDRON, "nlvr2", "train", None, {}), f"{CAULDRON} (nlvr2)"
    else:
        said, name = fails(hub.fetch_model, MODEL), MODEL
    assert said.startswith(f"{name}") and message in said and len(reachable.waits) <= 2


def test_a_download_that_breaks_off_goes_on(reachable, capsys, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    reachable.faults.append(Fault("GET /cdn.*model-00001", cut=25_000, times=3))
    folder = hub.fetch_model(MODEL)
    assert Phi3VForCausalLM.from_pretrained(folder).num_parameters() > 0
    assert capsys.readouterr().out == f"{MODEL}: the connection broke off; resumes the download\n"
    ranges = [record["range"] for record in reachable.requests if "/cdn" in record["path"] and record["range"]]
    assert ranges == ["bytes=20000-", "bytes=40000-", "bytes=60000-"] and not reachable.waits


def test_a_download_that_broke_off_is_not_begun_anew_if_the_server_does_not_answer_at_once(reachable, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    reachable.faults.append(Fault("GET /cdn.*model-00001", cut=25_000, times=1))
    reachable.faults.append(Fault("GET /cdn.*model-00001", delay=30, times=2))
    hub.fetch_model(MODEL)
    assert not reachable.waits and reachable.requests[-1]["range"] == "bytes=20000-"


def test_a_download_that_always_breaks_off(reachable, monkeypatch):
    monkeypatch.setattr(huggingface_hub.file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    reachable.faults.append(Fault("GET /cdn.*model-00001", cut=1000))
    said = fails(hub.fetch_model, MODEL)
    assert "the connection to 127.0.0.1 broke off (" in said and UNREACHABLE in said
    assert len([record for record in reachable.requests if "model-00001" in record["path"]]) == 3 * (1 + 6)


def test_a_server_without_an_answer(reachable, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT", 0.3)
    reachable.faults.append(Fault("GET /api/models", delay=30))
    assert "no answer from 127.0.0.1 within 0.3 s" in fails(hub.fetch_model, MODEL)
    assert reachable.waits == [1, 2]


def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("endpoint", "message", "waits"),
    [
        ("http://127.0.0.1:{closed}", "no connection to 127.0.0.1 ([Errno 111] Connection refused); " + UNREACHABLE, 2),
        (
            "http://me:s3cret@127.0.0.1:{closed}/hub",
            "from http://127.0.0.1:{closed}/hub: no connection to 127.0.0.1",
            2,
        ),
        ("http://no.such.host.invalid", "no connection to no.such.host.invalid (", 2),
        ("https://127.0.0.1:{open}", "no encrypted connection to 127.0.0.1 ([SSL", 0),
        ("127.0.0.1:{open}", "is no address; check HF_ENDPOINT", 0),
    ],
)
def test_an_address_where_no_hub_is(endpoint, message, waits, reachable, monkeypatch):
    ports = {"closed": closed_port(), "open": reachable.endpoint.rpartition(":")[2]}
    monkeypatch.setattr(constants, "ENDPOINT", endpoint.format(**ports))
    said = fails(hub.fetch_model, MODEL)
    assert message.format(**ports) in said and len(reachable.waits) == waits and "s3cret" not in said


@pytest.mark.parametrize(("port", "message"), [("closed", "Connection refused"), ("open", "the proxy answered 407")])
def test_a_proxy_that_fails(port, message, reachable, monkeypatch):
    reachable.faults.append(Fault(".*", status=407, message="Log in"))
    ports = {"closed": closed_port(), "open": reachable.endpoint.rpartition(":")[2]}
    monkeypatch.setenv("http_proxy", f"http://me:s3cret@127.0.0.1:{ports[port]}")
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    said = fails(hub.fetch_model, MODEL)
    assert message in said and "check HTTPS_PROXY, HTTP_PROXY and NO_PROXY" in said and "s3cret" not in said


# ---- Servers that are busy or down


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [
        (429, {"Retry-After": "7"}, [7, 7]),
        (503, {"Retry-After": "0"}, [0, 0]),
        (429, {"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, [56, 56]),
        (429, {}, [1, 2]),
        (500, {"Retry-After": "7"}, [1, 2]),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says(status, headers, waits, reachable, capsys):
    reachable.faults.append(Fault("GET /api/models", status=status, headers=headers, times=2))
    hub.fetch_model(MODEL)
    assert reachable.waits == waits
    said = capsys.readouterr().out.splitlines()
    assert (
        len(said) == 2 and f"answered {status}" in said[0] and f"tries again in {waits[0]} s (attempt 2 of" in said[0]
    )


def test_a_file_of_a_busy_server_is_asked_for_again(reachable):
    reachable.faults.append(Fault("HEAD .*resolve/.*tokenizer.json", status=429, headers={"Retry-After": "3"}, times=1))
    reachable.faults.append(Fault("GET /cdn/.*model-00002", status=503, headers={"Retry-After": "4"}, times=5))
    hub.fetch_model(MODEL)
    assert reachable.waits == [3, 4, 4, 4, 4, 4] and set(reachable.fetched().values()) == {1}


def test_a_server_that_stays_busy_or_wants_too_long_a_wait(reachable):
    reachable.faults.append(Fault(".*", status=429, headers={"Retry-After": "5"}))
    assert "answered 429" in fails(hub.fetch_model, MODEL)
    assert reachable.waits == [5] * 7
    reachable.faults[0].headers = {"Retry-After": "3600"}
    assert "answered 429" in fails(hub.fetch_model, MODEL)
    assert len(reachable.waits) == 7


@pytest.mark.parametrize("fault", ["stopped", "error", "busy", "no token"])
def test_with_a_full_cache_a_fault_is_said_once_and_the_cache_is_read(fault, reachable, capsys):
    hub.fetch_model(MODEL)
    hub.fetch_data(MINI, None)
    reachable.requests.clear()
    if fault == "stopped":
        reachable.stop()
    statuses = {"error": 500, "busy": 429, "no token": 401}
    if fault in statuses:
        reachable.faults.append(Fault(".*", status=statuses[fault], headers={"Retry-After": "60"}))
    folder = hub.fetch_model(MODEL)
    assert load_table(MINI, None, "train", None, {}).num_rows == 48
    said = capsys.readouterr().out
    assert re.fullmatch(rf"{MODEL}: .*; reads the cached files of commit {folder.name[:12]} instead, offline\n", said)
    assert len(reachable.requests) <= 1 and not reachable.waits
    assert "can't be fetched" in fails(hub.fetch_data, CAULDRON, "nlvr2")  # what is not cached is tried nevertheless
    assert len(reachable.waits) == {"no token": 0, "busy": 7}.get(fault, 2)


def test_offline_on_request(reachable, monkeypatch):
    monkeypatch.setattr(hub, "OFFLINE_ASKED_FOR", True)
    said = fails(hub.fetch_model, MODEL)
    assert f"cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: unset it, or run `hf download {MODEL}`" in said
    said = fails(hub.fetch_data, CAULDRON, "nlvr2")
    assert f"`hf download {CAULDRON} --repo-type dataset --include README.md --include 'nlvr2/*'`" in said
    monkeypatch.setattr(hub, "OFFLINE_ASKED_FOR", False)
    hub.fetch_model(MODEL, weights=False)
    monkeypatch.setattr(hub, "OFFLINE_ASKED_FOR", True)
    reachable.requests.clear()
    hub.fetch_model(MODEL, weights=False)
    assert "not completely" in fails(hub.fetch_model, MODEL)
    assert not reachable.requests


def test_a_cache_with_part_of_a_data_set_is_not_enough(reachable, monkeypatch):
    folder = hub.fetch_data(CAULDRON, "nlvr2")
    next(folder.glob("nlvr2/train-00003-*")).unlink()
    shutil.rmtree(folder.parents[1] / "trees")  # earlier versions of huggingface_hub did not write it
    huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE.clear()
    monkeypatch.setattr(hub, "OFFLINE_ASKED_FOR", True)
    assert "not completely" in fails(hub.fetch_data, CAULDRON, "nlvr2")


# ---- Contents


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("offline", [False, True])
def test_a_damaged_file_is_found_and_fetched_anew(name, offline, reachable, monkeypatch):
    folder = hub.fetch_model(MODEL)
    blob = (folder / name).resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    monkeypatch.setattr(hub, "OFFLINE_ASKED_FOR", offline)
    for _ in range(2):  # a damaged file is not noted as checked
        said = fails(hub.fetch_model, MODEL)
        assert f"the content of {name} in the cache is damaged" in said and f"run `rm {blob}` and start again" in said
    blob.unlink()
    monkeypatch.setattr(hub, "OFFLINE_ASKED_FOR", False)
    hub.fetch_model(MODEL)
    assert reachable.fetched()[f"{MODEL}/{name}"] == 2


def test_files_are_hashed_once(reachable, monkeypatch):
    hashed, hashes = [], hub._hashes
    monkeypatch.setattr(hub, "_hashes", lambda path, digits: hashed.append(path.name) or hashes(path, digits))
    monkeypatch.setattr(hub, "WORTH_SAYING", 0)
    folder = hub.fetch_model(MODEL)
    assert sorted(hashed) == sorted(path.name for path in folder.iterdir())
    hub.fetch_model(MODEL)
    assert len(hashed) == len(list(folder.iterdir()))
    (folder / "config.json").resolve().touch()
    hub.fetch_model(MODEL)
    assert hashed[-1] == "config.json" and hashed.count("config.json") == 2


def test_an_etag_of_another_kind_is_no_hash(reachable, monkeypatch):
    monkeypatch.setattr("loopback_hub.Repository.etag", lambda self, name: f"v1-{len(name)}-{self.files[name].name}")
    hub.fetch_model(MODEL)
    monkeypatch.undo()


# ---- Damaged tables and images


def damage(path: Path, kind: str):
    content = bytearray(path.read_bytes())
    if kind == "cut":
        content = content[:-100]
    elif kind == "a page":
        middle = pq.read_metadata(path).row_group(1).column(0).data_page_offset
        content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("cut", "is damaged at its row 0 ("), ("a page", "is damaged at its row 100 (")],
)
def test_a_damaged_table_is_named_with_file_and_row(kind, message, reachable, tmp_path):
    folder = tmp_path / "the_cauldron" / "nlvr2"
    folder.mkdir(parents=True)
    shutil.copy(reachable.root / "datasets" / CAULDRON / "README.md", folder.parent)
    rows = pq.read_table(reachable.root / "datasets" / CAULDRON / "nlvr2")
    pq.write_table(rows, folder / "train-00000-of-00001.parquet", row_group_size=100)
    assert load_table(CAULDRON, "nlvr2", "train", str(tmp_path), {}).num_rows == 520
    damage(folder / "train-00000-of-00001.parquet", kind)
    said = fails(load_table, CAULDRON, "nlvr2", "train", str(tmp_path), {})
    where = f"{tmp_path / 'the_cauldron'} (nlvr2), split train, can't be loaded: nlvr2/train-00000-of-00001.parquet"
    assert said.startswith(where) and message in said and said.endswith("): copy the file again")


def test_a_damaged_image_is_named_with_file_and_row(reachable, tmp_path):
    from phi3v.data.images import read_image

    table = load_table(CAULDRON, "nlvr2", "train[500:]", None, {})
    row = undecoded(table, 3)
    row["images"][1]["bytes"] = b"no image"
    said = fails(read_image, row["images"][1])
    assert said.startswith(f"{CAULDRON} (nlvr2), train row 503 (row 14 of train-00016-of-00017-")
    assert "): its image 2 can't be read as an image" in said
    assert (
        "(nlvr2), train row 0 (row 0 of train-00000"
        in undecoded(load_table(CAULDRON, "nlvr2", "train", None, {}), 0)["images"][0]["name"]
    )


# ---- Caches that can't be written to


def test_tables_are_kept_elsewhere_if_the_cache_is_read_only(reachable, tmp_path, monkeypatch, capsys):
    from phi3v.data import tables

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "datasets")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tables.writable_cache.cache_clear()
    for _ in range(2):
        assert load_table(MINI, None, "test", None, {}).num_rows == 16
    said = capsys.readouterr().out
    assert (
        said.count("can't be written to: tables and sizes are kept in") == 1
        and "HF_DATASETS_CACHE chooses another" in said
    )
    tables.writable_cache.cache_clear()


def test_a_cache_that_cannot_be_written_to(reachable, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    said = fails(hub.fetch_model, MODEL)
    assert "the cache can't be written" in said and f"set HF_HOME, now {constants.HF_HOME}, to a folder" in said


# ---- Trainings and whole commands


def start(server: LoopbackHub, home: Path, *command, **environment) -> subprocess.CompletedProcess:
    server.requests.clear()
    variables = server.environment(home, **environment)
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=home, env=variables, capture_output=True, text=True, timeout=900)


def short_training(out: Path, *flags) -> list:
    """The flags of a training of one step with a script's default model and data."""
    short = "--max_steps 1 --warmup_steps 0 --max_eval_samples 2 --no_eval_before --dataloader_num_workers 0 --no-tqdm"
    return ["--output_dir", out, *short.split(), *"--use_lora --max_new_tokens 2 --num_crops 2".split(), *flags]


@pytest.fixture(scope="module")
def ranks_with_a_hub(hub_repositories, tmp_path_factory):
    """Two ranks that read the Hub `ranks.hub` and have their cache in `ranks.home`."""
    home = tmp_path_factory.mktemp("ranks") / "home"
    with LoopbackHub(hub_repositories) as server, TwoRanks(home.parent, server.environment(home)) as ranks:
        ranks.hub, ranks.home = server, home
        yield ranks


@pytest.fixture
def ranks(ranks_with_a_hub):
    """With an empty cache, and without faults and requests."""
    ranks_with_a_hub.hub.faults.clear()
    ranks_with_a_hub.hub.requests.clear()
    for name in ("hub", "datasets"):
        shutil.rmtree(ranks_with_a_hub.home / name, ignore_errors=True)
    return ranks_with_a_hub


@pytest.mark.slow
def test_two_ranks_on_an_empty_cache_then_offline_then_with_a_hub_that_is_down(ranks, tmp_path):
    hub, outs = ranks.hub, [tmp_path / name for name in ("out", "offline", "down")]
    first = ranks.train(*short_training(outs[0], "--max_train_samples", 16), script="finetune_hf_trainer_nlvr2")
    assert ["losses" in rank for rank in first] == [True, True], first
    assert hub.by_rank().keys() <= {None, 0} and set(hub.fetched().values()) == {1}
    assert not [name for name in hub.fetched() if name.endswith((".py", ".bin")) or "/docvqa/" in name]
    # Whole commands now, of one process each: what two ranks have trained on is what one trains on.
    program = ROOT / "finetune_hf_trainer_nlvr2.py"
    flags = short_training(outs[1], "--max_train_samples", 16)
    done = start(hub, ranks.home, program, *flags, HF_HUB_OFFLINE=1)
    assert done.returncode == 0 and not hub.requests, done.stderr[-3000:]
    hub.faults.append(Fault(".*", status=503))
    done = start(hub, ranks.home, program, *short_training(outs[2], "--max_train_samples", 16))
    assert done.returncode == 0 and "reads the cached files of commit" in done.stdout, done.stderr[-3000:]
    settings = [json.loads((out / "finished.json").read_text()) for out in outs]
    for found in settings:
        del found["world_size"], found["gradient_accumulation_steps"]
    assert settings[0] == settings[1] == settings[2]
    adapters = [load_file(out / "adapter_model.safetensors") for out in outs]
    for adapter in adapters[1:]:
        torch.testing.assert_close(adapter, adapters[0], rtol=0, atol=1e-6)  # the step has changed weights by 4e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("GET /cdn/models.*00002", reset=True), "broke off"),
        (Fault("GET /cdn/datasets.*train", corrupt=True), "in the cache is damaged, as its hash is not the Hub's"),
    ],
)
def test_a_fault_ends_all_ranks_with_one_line(fault, message, ranks, tmp_path):
    ranks.hub.faults.append(fault)
    first, second = ranks.train(*short_training(tmp_path / "out"), script="finetune_hf_trainer_docvqa")
    assert message in first["error"] and "\n" not in first["error"] and second == first
    assert ranks.hub.by_rank().keys() <= {None, 0}


@pytest.mark.slow
def test_a_run_and_the_tools_with_a_read_only_home(hub, tmp_path):
    home = tmp_path / "home"
    question = [ROOT / "tools" / "ask.py", MODEL, "--question", "What is it?", "--max_new_tokens", 2]
    done = start(hub, home, *question)
    assert done.returncode == 0 and hub.by_rank().keys() <= {None, 0}, done.stderr
    environment = hub.environment(home)
    for path in (home, *home.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~0o222)
    as_user = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    command = [*as_user, sys.executable, *map(str, question)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    for path in (home, *home.rglob("*")):
        path.chmod(path.stat().st_mode | 0o700)
    assert done.returncode == 0, done.stderr


def test_tools_say_what_is_wrong_with_the_hub(reachable, tmp_path):
    reachable.faults.append(Fault(".*", status=401, code="RepoNotFound"))
    assert "set HF_TOKEN" in fails(ask.main, ["me/private", "--question", "What?"])
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "me/private"}')
    (adapter / "adapter_model.safetensors").write_text("")
    for tool in (ask, merge_adapter):
        assert fails(tool.main, [str(adapter), str(tmp_path / "out")]).endswith(": give --base")


def test_an_estimate_fetches_no_weights(reachable, capsys):
    import finetune_hf_trainer_docvqa as script

    script.main(["--estimate", "--no-tqdm"])
    assert "FLOP" in capsys.readouterr().out
    assert reachable.fetched() and not [name for name in reachable.fetched() if name.endswith(".safetensors")]


# ---- The converter, which does not import this package


def converted(server: LoopbackHub, home: Path, out: Path, **environment) -> subprocess.CompletedProcess:
    return start(server, home, ROOT / "convert_ucf101.py", "--out_dir", out, "--num_workers", 1, **environment)


@pytest.mark.slow
def test_the_converter_fetches_once_and_reads_the_cache_if_the_hub_is_down(hub, tmp_path):
    home = tmp_path / "home"
    hub.faults.append(Fault("GET /api/datasets", status=429, headers={"Retry-After": "1"}, times=1))
    done = converted(hub, home, tmp_path / "first")
    assert done.returncode == 0 and "tries again in 1 s" in done.stdout, done.stderr
    assert [name.rpartition("/")[2] for name in hub.fetched()] == ["UCF101_subset.tar.gz"]
    hub.faults.append(Fault(".*", status=500))
    done = converted(hub, home, tmp_path / "second")
    assert done.returncode == 0 and done.stdout.count("reads the cached copy instead") == 1, done.stderr
    done = converted(hub, home, tmp_path / "third", HF_HUB_OFFLINE=1)
    assert done.returncode == 0 and not hub.requests, done.stderr
    for name in ("second", "third"):
        lines = (tmp_path / name / "ucf101_train.jsonl").read_bytes()
        assert lines == (tmp_path / "first" / "ucf101_train.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("GET /cdn", corrupt=True), "in the cache is damaged, as its SHA-256 is not the Hub's: run `rm /"),
        (Fault(".*", status=500), "500"),
        (Fault("GET /cdn", reset=True), "reset by peer"),
        (Fault(".*", status=401, code="RepoNotFound"), "401"),
    ],
)
def test_what_the_converter_says_about_a_fault(fault, message, hub, tmp_path):
    hub.faults.append(fault)
    done = converted(hub, tmp_path / "home", tmp_path / "out")
    (error,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and error.startswith("error: ") and message in error
    assert "damaged" in error or "pass the file with --source" in error
