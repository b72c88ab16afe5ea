"""Two processes that torchrun has started, and that train again and again.

A process takes 6 s to import what training needs, and a training of a few steps 1 s. So tests of two ranks share one
launch where its beginning and its end are not what they are about. Each command line starts as in a new process, apart
from the process group, which stays.
"""

import contextlib
import gc
import hashlib
import json
import os
import select
import subprocess
import sys
import time
import traceback
from pathlib import Path

import psutil

LAUNCH_TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LIMIT = 900  # seconds for a training; only one that hangs takes so long, however busy the machine is


class TwoRanks:
    """Use as a context manager. The processes start with the first training; after a failure, the next one starts new
    processes.

    folder: an existing folder for pipes and logs; environment: of the processes.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment, self.torchrun, self.launches = folder, environment, None, 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.end()

    def train(self, *flags, odd=(), script: str = "finetune_hf_trainer_ucf101") -> list[dict]:
        """Calls the `main` of a script on both ranks. odd: flags of rank 1 alone, after the others.

        Returns what `train_and_report` returns on each rank. Fails if a rank fails with anything but an InputError.
        """
        if self.torchrun is None:
            self._start()
        for rank, pipe in enumerate(self.commands):
            own = list(map(str, [*flags, *(odd if rank else ())]))
            os.write(pipe, json.dumps({"script": script, "flags": own}).encode() + b"\n")
        found, end = [b"", b""], time.monotonic() + LIMIT
        while not all(text.endswith(b"\n") for text in found):
            ready, _, _ = select.select(self.answers, [], [], 0.5)
            for pipe in ready:
                found[self.answers.index(pipe)] += os.read(pipe, 1 << 16)
            failures = [text for text in found if text.endswith(b"\n") and "failure" in json.loads(text)]
            if failures or self.torchrun.poll() is not None or time.monotonic() > end:
                said = json.loads(failures[0])["failure"] if failures else "the ranks ended, or did not answer"
                self.end(kill=True)
                raise AssertionError(f"{said}\n{self.log.read_text()[-3000:]}")
        return list(map(json.loads, found))

    def _start(self):
        self.launches += 1
        own = self.folder / f"launch{self.launches}"
        own.mkdir()
        for kind in ("commands", "answers"):
            for rank in (0, 1):
                os.mkfifo(own / f"{kind}{rank}")
            # Opened for both directions, because otherwise this process would wait for the other one to open it.
            setattr(self, kind, [os.open(own / f"{kind}{rank}", os.O_RDWR) for rank in (0, 1)])
        self.log = own / "log"
        command = [sys.executable, *LAUNCH_TWO_RANKS, __file__, str(own)]
        with open(self.log, "w") as log:
            self.torchrun = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def end(self, kill: bool = False):
        """Ends the processes, and waits for that. kill: they may hang, or not have read the command before."""
        if self.torchrun is None:
            return
        torchrun, self.torchrun = self.torchrun, None
        if kill:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(torchrun.pid).children(recursive=True), torchrun]:
                    process.kill()
        for pipe in (*self.commands, *self.answers):
            os.close(pipe)  # the ranks read the end of their commands, and end
        torchrun.wait(timeout=LIMIT)


# ---- In each of the two processes


def train_and_report(module: str, flags: list[str]) -> dict:
    """Trains with the script `module`. Returns the weights' hash, the losses, the engine, and how often gradients were
    sent; or `error`, the message of an InputError; or `failure`, the traceback of another exception. `already_joined`
    says whether there was a process group before."""
    import importlib

    import torch.distributed as dist

    from phi3v.errors import InputError
    from phi3v.training.folder_lock import unlock_folder

    all_reduce, sizes, about = dist.all_reduce, [], {"already_joined": dist.is_initialized()}

    def counted_all_reduce(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted_all_reduce
    try:
        trainer = importlib.import_module(module).main(flags)
        if trainer is None:
            return about
        digest = hashlib.sha256()
        for name, tensor in sorted(trainer.accelerator.unwrap_model(trainer.model).state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        about |= {"weights": digest.hexdigest(), "losses": losses, "engine": type(trainer.model_wrapped).__name__}
        return about | {"gradients_sent": sum(n > 10_000 for n in sizes)}
    except InputError as e:
        return about | {"error": str(e)}
    except BaseException:
        return about | {"failure": traceback.format_exc()}
    finally:
        dist.all_reduce = all_reduce
        unlock_folder()  # as the end of the process would


def answer_commands(folder: Path):
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    rank = os.environ["RANK"]
    environment, limit = dict(os.environ), sys.getrecursionlimit()
    with open(folder / f"commands{rank}") as commands, open(folder / f"answers{rank}", "w") as answers:
        for line in commands:
            command = json.loads(line)
            found = train_and_report(command["script"], command["flags"])
            # As in a new process: accelerate's variables would put the next training under DeepSpeed.
            os.environ.clear()
            os.environ.update(environment)
            sys.setrecursionlimit(limit)
            unset_hf_deepspeed_config()  # otherwise the next model would be split as ZeRO-3 does it
            gc.collect()
            print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    from phi3v.errors import exit_on_input_error

    exit_on_input_error(lambda: answer_commands(Path(sys.argv[1])))
