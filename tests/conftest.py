"""Fixtures that several test files use."""

import os
import signal
import sys
from pathlib import Path

import helpers
import pytest


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
def toy_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    helpers.write_toy_data(folder)
    return folder


@pytest.fixture(scope="session")
def toy_tables(tmp_path_factory) -> Path:
    """A --data_dir for the three tasks whose data are tables."""
    folder = tmp_path_factory.mktemp("tables")
    helpers.write_toy_tables(folder)
    return folder


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
def saved_run(toy_data, tmp_path_factory):
    """saved_run(mode): the output folder of a short training, which is made when a test first asks for it. Tests must
    not change it."""
    made = {}

    def get(mode) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp(mode)
            helpers.train(toy_data, made[mode], *helpers.FAR, *helpers.SAVED_MODES[mode])
        return made[mode]

    return get


@pytest.fixture(scope="session")
def finished_run(toy_data, tmp_path_factory):
    """finished_run(mode): the output folder of a finished training with checkpoints, which is made when a test first
    asks for it. Tests must not change it."""
    made = {}

    def get(mode) -> Path:
        if mode not in made:
            made[mode] = tmp_path_factory.mktemp("finished") / "out"
            helpers.train_resumable(toy_data, made[mode], *helpers.RESUMABLE_MODES[mode])
        return made[mode]

    return get


@pytest.fixture(scope="session")
def hub_repositories(tmp_path_factory) -> Path:
    """Small models and data sets with the Hub's names and layouts. Tests must not change them."""
    from hub_repositories import write_repositories

    folder = tmp_path_factory.mktemp("hub")
    write_repositories(folder)
    return folder


@pytest.fixture
def hub(hub_repositories):
    """A Hub on this machine that serves `hub_repositories`, without faults and with an empty list of requests.

    Start a process with `env=hub.environment(home)`, where `home` is a new folder. A test that changes a repository
    copies what it needs to a folder of its own first, and sets `hub.root`.
    """
    from loopback_hub import LoopbackHub

    with LoopbackHub(hub_repositories) as server:
        yield server
