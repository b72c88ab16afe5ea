"""Fetches models and data sets from the Hugging Face Hub into the cache; afterwards everything is read from there.

Only the first rank of a node talks to the Hub. When a fetch function returns, this process is offline: transformers and
datasets read the cache, and the other ranks of the node do so from the start. Without this, each rank would ask the Hub
dozens of times, and a fault of the network could occur anywhere in a run.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha1
from pathlib import Path

from huggingface_hub import constants, set_client_factory, snapshot_download
from huggingface_hub.utils import filter_repo_objects, logging
from huggingface_hub.utils._http import default_client_factory

from .console import tell
from .errors import InputError
from .files import read_json, replacing
from .hub_faults import TIMEOUT, Fault, explain, refused, without_password
from .hub_names import Wanted, data_commits, is_hub_name
from .old_versions import httpx
from .ranks import is_first_of_node

CONFIGS = ["config.json", "adapter_config.json"]  # a model has the one, an adapter the other
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER += ["tokenizer.model", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*"]
INDEX = "model.safetensors.index.json"
SMALL_FILES = [*CONFIGS, *TOKENIZER, INDEX, "generation_config.json", "preprocessor_config.json"]
SMALL_FILES += ["processor_config.json", "finished.json"]  # the last by which the output of a run is known
WEIGHTS = ["model.safetensors", "adapter_model.safetensors", "separators.safetensors", "vision.safetensors"]
CARDS = ["README.md", "dataset_infos.json", ".huggingface.yaml"]  # what describes a data set's columns and files

ATTEMPTS = 3  # to reach a server, or to get an answer other than an error
ATTEMPTS_IF_BUSY = 8  # when a server says after how many seconds to ask again
LONGEST_WAIT = 900  # seconds; the Hub counts requests over 300
CHECKED = ".checked_by_phi3v.json"  # in a repository's folder of the cache: which of its files were compared

WORTH_SAYING = 10**8  # bytes to hash

OFFLINE_ASKED_FOR = constants.is_offline_mode()  # by HF_HUB_OFFLINE=1
OFFLINE_ASKED_FOR_DATA = os.environ.get("HF_DATASETS_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
hub_is_down = False  # whether an earlier fetch of this process found that


# ---- What a run needs


def fetch_model(name: str, weights: bool = True, revision: str | None = None, check: Callable | None = None) -> Path:
    """Makes sure that a model, or an adapter, is in the cache. Returns its folder there, whose name is the commit.

    name: a repository on the Hub; for a local folder, that folder is returned.
    weights: without them, fetches the configuration, the processor and the tokenizer alone.
    check: called with the folder before its weights are fetched; may raise an InputError.
    Raises InputError if the files can't be had or are damaged.
    """
    if not is_hub_name(name):
        if check:
            check(Path(name))
        return Path(name)
    go_offline()
    wanted = Wanted(name, revision=revision)
    folder = _fetch(wanted, SMALL_FILES, lambda folder: any((folder / config).is_file() for config in CONFIGS))
    if not any((folder / config).is_file() for config in CONFIGS):
        raise InputError(f"{wanted} has no config.json on the Hub: is it a model?")
    if check:
        check(folder)
    if not weights:
        return folder
    try:
        files = shards_of(folder / INDEX) if (folder / INDEX).is_file() else WEIGHTS
    except InputError as e:
        raise InputError(f"{e}; if it is only damaged: delete it, and it is fetched again") from None
    every = files if files is not WEIGHTS else []
    at_commit = Wanted(name, revision=folder.name)
    _fetch(at_commit, files, lambda folder: all((folder / file).is_file() for file in every), shown=wanted)
    if not any((folder / file).is_file() for file in files):
        raise InputError(f"{wanted} has no weights in safetensors on the Hub, and files of other kinds are not read")
    return folder


def shards_of(index: Path) -> list[str]:
    """The names of the files that an index of weights lists. They are in safetensors and lie beside it.

    Raises InputError for an index that names other files, or that transformers could not read."""
    content = read_json(index)
    if not (isinstance(content, dict) and isinstance(content.get("metadata"), dict)):
        raise InputError(f"{index} is not an index of weights: it must be an object with metadata and weight_map")
    names = content.get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else []
    bad = [name for name in names if not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", name))]
    if bad or not names:
        found = f"names {bad[0]!r:.80}" if bad else "names no files"
        raise InputError(f"{index} is not an index of weights: it {found}, must name files *.safetensors beside it")
    return sorted(set(names))


def fetch_data(repo: str, config: str | None, revision: str | None = None) -> Path:
    """Makes sure that a data set is in the cache. Returns its folder there, whose name is the commit.

    config: which of its configurations to fetch, a folder of the repository; None for all parquet files.
    Raises InputError if the files can't be had or are damaged.
    """
    files = f"{config}/*.parquet" if config else "*.parquet"

    def is_whole(folder: Path) -> bool:
        found = list(folder.glob(f"{config}/*.parquet" if config else "**/*.parquet"))
        return bool(found) and not missing_parts(found)

    folder = _fetch(Wanted(repo, "dataset", revision, config), [*CARDS, files], is_whole)
    data_commits[repo] = folder.name
    return folder


def missing_parts(files: list[Path]) -> list[str]:
    """The names of the files that lack among parts named like train-00000-of-00014.parquet."""
    parts = defaultdict(set)
    for path in files:
        if found := re.match(r"(.*)-(\d+)-of-(\d+)", path.name):
            parts[path.parent, found[1], found[3]].add(found[2])
    wanted = ((*key, f"{number:0{len(key[2])}}") for key in parts for number in range(int(key[2])))
    return [f"{folder.name}/{stem}-{k}-of-{n}" for folder, stem, n, k in wanted if k not in parts[folder, stem, n]]


# ---- Fetching


def go_offline():
    """From now on, no library of this process talks to the Hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that it starts, and for what is not imported yet
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def _fetch(wanted: Wanted, patterns: list[str], is_whole: Callable, shown: Wanted | None = None) -> Path:
    """The folder of a snapshot with all files that fit the patterns.

    is_whole: called with a folder of the cache; whether it holds what is needed. shown: how messages name it.
    """
    global hub_is_down
    shown = shown or wanted
    go_offline()
    cached = functools.partial(_cached, wanted, patterns, is_whole)
    asked_for = OFFLINE_ASKED_FOR or wanted.kind == "dataset" and OFFLINE_ASKED_FOR_DATA
    if asked_for or not is_first_of_node() or (hub_is_down and cached()):
        if (folder := cached()) is None:
            raise InputError(
                f"{shown} is not, or not completely, in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
                f"unset it, or run `{shown.command}` where the Hub can be reached, and set HF_HOME to that cache"
            )
        if is_first_of_node():
            _check_contents(folder, patterns, shown)
        return folder
    attempt = 0
    while True:
        attempt += 1
        try:
            with _online(shown):
                folder = Path(_snapshot(wanted, patterns))
            break
        except Exception as e:  # the library raises errors of many classes
            fault = e if isinstance(e, Fault) else explain(e)
        if folder := cached():
            hub_is_down = True
            tell(f"{shown}: {fault}; reads the cached files of commit {folder.name[:12]} instead, offline")
            break
        tries = ATTEMPTS_IF_BUSY if fault.wait is not None else ATTEMPTS
        if not fault.passes or attempt >= tries or (fault.wait or 0) > LONGEST_WAIT:
            elsewhere = f"run `{shown.command}` where the Hub can be reached, and set HF_HUB_OFFLINE=1 and HF_HOME here"
            help = fault.help or f"try again later, set HF_ENDPOINT to a mirror, or {elsewhere}"
            raise InputError(f"{shown} can't be fetched from {without_password(constants.ENDPOINT)}: {fault}; {help}")
        wait = 2 ** (attempt - 1) if fault.wait is None else fault.wait
        tell(f"{shown}: {fault}; tries again in {wait:.0f} s (attempt {attempt + 1} of {tries})")
        time.sleep(wait)
    _check_contents(folder, patterns, shown)
    return folder


def _snapshot(wanted: Wanted, patterns: list[str], **options) -> str:
    return snapshot_download(
        wanted.repo, repo_type=wanted.kind, revision=wanted.revision, allow_patterns=patterns, **options
    )


def _cached(wanted: Wanted, patterns: list[str], is_whole: Callable) -> Path | None:
    try:
        folder = Path(_snapshot(wanted, patterns, local_files_only=True))
    except (OSError, ValueError):  # LocalEntryNotFoundError is an OSError
        return None
    return folder if is_whole(folder) else None


@contextlib.contextmanager
def _online(shown: Wanted):
    """Lets this process talk to the Hub, with faults and retries in our hands."""
    verbosity, asked = logging.get_verbosity(), Counter()

    def client():
        made = default_client_factory()
        made.send = functools.partial(_send, made.send, shown, asked)
        return made

    try:
        constants.HF_HUB_OFFLINE = False
        set_client_factory(client)
        logging.set_verbosity_error()  # its warnings are two lines each, with long addresses
        yield
    finally:
        logging.set_verbosity(verbosity)
        set_client_factory(default_client_factory)
        go_offline()


def _send(send: Callable, shown: Wanted, asked: Counter, request: httpx.Request, **options) -> httpx.Response:
    """Sends a request. Raises Fault at once where huggingface_hub would retry for minutes, or read the cache, in
    silence. asked: how often each download was begun in this attempt."""
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {k: limits.get(k) or TIMEOUT for k in ("connect", "read", "write", "pool")}
    asked[request.url] += options.get("stream", False)
    if asked[request.url] == 2:
        tell(f"{shown}: the connection broke off; resumes the download")
    try:
        response = send(request, **options)
    except (httpx.RequestError, httpx.InvalidURL) as e:
        if asked[request.url] > 1:
            raise  # huggingface_hub resumes a broken download five times; a new attempt starts anew
        raise explain(e) from e
    if response.status_code >= 400:
        response.read()
        raise refused(response)
    return response


# ---- Whether files are what the Hub has


def _check_contents(folder: Path, patterns: list[str], shown: Wanted):
    """Compares the files of a snapshot with their hashes, once for each file: huggingface_hub compares sizes alone.

    In the cache, the name of a file's content is the ETag of the Hub, which is SHA-256 for weights and tables, and the
    hash of Git for small files. Raises InputError for a file that differs.
    """
    record = folder.parents[1] / CHECKED
    try:
        checked = dict(read_json(record))
    except (OSError, ValueError, TypeError):
        checked = {}
    every = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    names = filter_repo_objects(every, allow_patterns=patterns)
    new = {}
    for path in (folder / name for name in names):
        etag = Path(os.readlink(path)).name if path.is_symlink() else ""
        if path.is_file() and re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", etag):
            state = [path.stat().st_size, path.stat().st_mtime_ns]
            if checked.get(etag) != state:
                new[path] = etag, state
    total = sum(size for _, (size, _) in new.values())
    if total > WORTH_SAYING:
        tell(f"{shown}: compares {total / 1e9:.1f} GB of new files with the Hub's hashes, once")
    with ThreadPoolExecutor() as pool:
        found = dict(zip(new, pool.map(_hashes, new, [len(etag) for etag, _ in new.values()]), strict=True))
    bad = [path for path, (etag, _) in new.items() if etag not in found[path]]
    checked |= {etag: state for path, (etag, state) in new.items() if path not in bad}
    if new:
        with contextlib.suppress(OSError), replacing(record, several_writers=True) as partial:  # may be read-only
            partial.write_text(json.dumps(checked))
    if bad:
        names = ", ".join(path.relative_to(folder).as_posix() for path in bad)
        delete = " ".join(shlex.quote(os.path.realpath(path)) for path in bad)
        raise InputError(
            f"{shown}: the content of {names} in the cache is damaged, as its hash is not the Hub's: "
            f"run `rm {delete}` and start again, and it is downloaded anew"
        )


def _hashes(path: Path, digits: int) -> tuple[str, ...]:
    """The hashes of a file that a name with so many hexadecimal digits can be."""
    with open(path, "rb") as file:
        if digits == 64:
            return (file_digest(file, "sha256").hexdigest(),)
        content = file.read()
    # Some mirrors send SHA-1 of the content where the Hub sends that of Git's object.
    return tuple(sha1(start + content).hexdigest() for start in (b"blob %d\0" % len(content), b""))
