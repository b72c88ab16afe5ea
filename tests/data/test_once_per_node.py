"""One process of each node loads the data, and the others share them or load after it."""

import pickle
import threading

import pytest

from phi3v.data import once_per_node, stored_lines
from phi3v.data.once_per_node import load_once_per_node
from phi3v.data.stored_lines import StoredLines
from phi3v.errors import InputError

LINES = [b"first", b"", b"third \xe2\x80\xa8 line\n"]


def upper(line: bytes) -> bytes:
    return line.upper()


WANTED = list(map(upper, LINES))


class Ranks:
    """Threads in place of the processes of a run, with as many on each node."""

    def __init__(self, nodes: int, per_node: int, monkeypatch):
        self.n, self.own, self.answers = nodes * per_node, threading.local(), {}
        self.barrier, self.loads = threading.Barrier(self.n, timeout=60), []
        monkeypatch.setattr(once_per_node, "rank", lambda: self.own.rank)
        monkeypatch.setattr(once_per_node, "local_rank", lambda: self.own.rank % per_node)
        for module in (once_per_node, stored_lines):
            monkeypatch.setattr(module, "is_first_of_node", lambda: self.own.rank % per_node == 0)
        monkeypatch.setattr(once_per_node, "gather_object", self.gather)
        monkeypatch.setattr(once_per_node, "say", lambda line: self.own.rank == 0 and print(line))

    def gather(self, own: list) -> list:
        self.answers[self.own.rank] = pickle.dumps(own)
        self.barrier.wait()
        found = [item for rank in range(self.n) for item in pickle.loads(self.answers[rank])]
        self.barrier.wait()
        return found

    def load(self, loader, flags=lambda rank: "flags") -> list:
        """What `load_once_per_node` returns or raises on each rank. loader, flags: are called with the rank."""
        found = [None] * self.n

        def one(rank):
            self.own.rank = rank

            def load(args):
                self.loads.append(rank)
                return loader(rank)

            try:
                found[rank] = [list(part) for part in load_once_per_node(load, flags(rank))]
            except InputError as e:
                found[rank] = str(e)

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def stored_parts(rank):
    return StoredLines(iter(LINES), upper), StoredLines(iter(LINES[:2]), upper)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_one_process_of_each_node_reads(nodes, per_node, monkeypatch):
    ranks = Ranks(nodes, per_node, monkeypatch)
    firsts = [rank - rank % per_node for rank in range(ranks.n)]
    assert ranks.load(lambda rank: (StoredLines([b"%d" % rank], upper),)) == [[[b"%d" % rank]] for rank in firsts]
    assert sorted(ranks.loads) == list(range(0, ranks.n, per_node))


def test_tables_are_loaded_by_all_after_the_first_of_the_node(monkeypatch):
    ranks = Ranks(2, 2, monkeypatch)
    assert ranks.load(lambda rank: ([rank], StoredLines(iter(LINES), upper))) == [[[i], WANTED] for i in range(4)]
    assert set(ranks.loads[:2]) == {0, 2} and set(ranks.loads[2:]) == {1, 3}


def test_a_process_with_other_flags_reads_for_itself(monkeypatch):
    ranks = Ranks(1, 3, monkeypatch)
    found = ranks.load(lambda rank: (StoredLines([b"%d" % rank], upper),), lambda rank: f"--data_dir {rank // 2}")
    assert found == [[[b"0"]], [[b"0"]], [[b"2"]]] and ranks.loads == [0, 2]


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_of_one_node_is_raised_by_all(failing, monkeypatch):
    def load(rank):
        if rank == failing:
            raise InputError("no such file")
        return stored_parts(rank)

    ranks = Ranks(2, 2, monkeypatch)
    assert ranks.load(load) == ["no such file"] * 4 and sorted(ranks.loads) == [0, 2]


@pytest.mark.parametrize("works", [True, False])
def test_who_can_not_open_the_file_reads_for_himself(works, monkeypatch, capsys):
    def load(rank):
        if rank == 1:
            if not works:
                raise InputError("no such file")
            return [["own"]]
        parts = stored_parts(rank)
        # As if this process had another /proc than the others.
        monkeypatch.setattr(stored_lines, "_path", lambda file: "/proc/0/fd/0")
        return parts

    ranks = Ranks(1, 2, monkeypatch)
    assert ranks.load(load) == ([[WANTED, WANTED[:2]], [["own"]]] if works else ["no such file"] * 2)
    assert ranks.loads == [0, 1] and capsys.readouterr().out.count("can't open one another's files") == works
