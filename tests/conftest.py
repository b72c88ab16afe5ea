"""Fixtures that several test files use.

`make test` lets several processes share the tests, file by file. What takes long to make is made once for all of them.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import helpers
import pytest
from filelock import FileLock
from safetensors.torch import load_file

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ  # whether this is one of several processes that share the tests


def pytest_collection_modifyitems(items):
    """Where several processes share the tests, the files with the most slow tests start first, so that no process is
    left with one of them at the end."""
    if PARALLEL:
        slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
        items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True)
def no_trace_of_a_training():
    """Deletes the environment variables by which a training under DeepSpeed tells accelerate so. With them, the next
    training in this process would also run under DeepSpeed."""
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


@pytest.fixture(autouse=True)
def scripts_do_not_end_this_process(monkeypatch):
    """A script that a test calls in this process ends with SystemExit instead of ending the process at once."""
    from phi3v import errors
    from phi3v.training.folder_lock import unlock_folder

    def leave(status):
        unlock_folder()  # as the end of the process would
        sys.exit(status)

    monkeypatch.setattr(errors, "end_process", leave)


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run takes over Ctrl-C and other signals for its whole process."""
    from phi3v.workers import STOP_SIGNALS

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_folder_stays_locked():
    """A run that ends with an error in this process would keep its lock."""
    from phi3v.training.folder_lock import unlock_folder

    yield
    unlock_folder()


@pytest.fixture(autouse=True)
def recursion_limit_as_before():
    """torch's compiler raises Python's limit for the whole process, and tests of nested input expect the usual one."""
    limit = sys.getrecursionlimit()
    yield
    sys.setrecursionlimit(limit)


started_processes = []


def note_started_process(event: str, details):
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"):
        started_processes.append(f"{event} {details}")


sys.addaudithook(note_started_process)


@pytest.fixture(autouse=True)
def only_slow_tests_start_processes(request):
    """`pytest -m "not slow"` starts no process; a test that starts one has the mark `slow`."""
    started_processes.clear()
    yield
    if not request.node.get_closest_marker("slow"):
        assert not started_processes, "mark this test with pytest.mark.slow"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): a folder that `make(folder)` has filled, once for all processes that share the tests.
    Tests must not change it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if PARALLEL else base

    def get(name, make) -> Path:
        folder, done = base / name, base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a test that failed in `make`
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def toy_data(made_once) -> Path:
    return made_once("toy", helpers.write_toy_data)


@pytest.fixture(scope="session")
def toy_tables(made_once) -> Path:
    """A --data_dir for the three tasks whose data are tables."""
    return made_once("tables", helpers.write_toy_tables)


@pytest.fixture(scope="session")
def processor():
    from phi3v import Phi3VProcessor

    return Phi3VProcessor.from_pretrained(helpers.CHECKPOINT)


@pytest.fixture(scope="session")
def toy_examples(toy_data) -> list[dict]:
    """The training conversations of the toy data."""
    from phi3v.data.annotations import read_conversations

    return read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images")


@pytest.fixture(scope="session")
def toy_batch(toy_data, toy_examples):
    """Four examples of the toy data, padded on the right."""
    from phi3v import Phi3VProcessor
    from phi3v.data.collate import Collator
    from phi3v.data.conversations import ConversationDataset

    processor = Phi3VProcessor.from_pretrained(helpers.CHECKPOINT, num_crops=4)
    data = ConversationDataset(toy_examples, processor)
    return Collator(processor, "right")([data[i] for i in (1, 2, 3, 5)])


@pytest.fixture(scope="session")
def saved_run(toy_data, made_once):
    """saved_run(mode): the output folder of a short training, which is made when a test first asks for it. Tests must
    not change it."""

    def get(mode) -> Path:
        flags = [*helpers.FAR, *helpers.SAVED_MODES[mode]]
        return made_once(f"saved-{mode}", lambda folder: helpers.train(toy_data, folder, *flags))

    return get


@pytest.fixture(scope="session")
def finished_run(toy_data, made_once):
    """finished_run(mode): the output folder of a finished training with checkpoints, which is made when a test first
    asks for it. Tests must not change it."""

    def get(mode) -> Path:
        flags = helpers.RESUMABLE_MODES[mode]
        number = list(helpers.RESUMABLE_MODES).index(mode)
        return made_once(f"finished-{number}", lambda folder: helpers.train_resumable(toy_data, folder, *flags))

    return get


@pytest.fixture(scope="session")
def one_process(toy_data, made_once) -> tuple[list[float], dict]:
    """Losses and weights of six steps of SGD on four examples each, one example at a time. Any other division into
    micro-batches, or among ranks, must give these numbers."""

    def make(folder):
        flags = [*helpers.SIX_STEPS, "--deepspeed", "none", "--batch_size_per_gpu", "1"]
        losses = helpers.train_losses(toy_data, folder / "out", *flags)
        (folder / "losses.json").write_text(json.dumps(losses))

    folder = made_once("one_process", make)
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "out" / "model.safetensors")


@pytest.fixture(scope="session")
def hub_repositories(made_once) -> Path:
    """Small models and data sets with the Hub's names and layouts. Tests must not change them."""
    from hub_repositories import write_repositories

    return made_once("hub", write_repositories)


@pytest.fixture
def hub(hub_repositories):
    """A Hub on this machine that serves `hub_repositories`, without faults and with an empty list of requests.

    Start a process with `env=hub.environment(home)`, where `home` is a new folder. A test that changes a repository
    copies what it needs to a folder of its own first, and sets `hub.root`.
    """
    from loopback_hub import LoopbackHub

    with LoopbackHub(hub_repositories) as server:
        yield server
