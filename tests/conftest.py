"""A small data set in the conversation format: ragged, several images, several turns, text only."""

import json
import os
import random
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "demo" / "base_checkpoint"


@pytest.fixture(autouse=True)
def no_trace_of_a_training():
    """A training under DeepSpeed tells accelerate so by the environment, and the next one would be under it too."""
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


def environment(**more) -> dict[str, str]:
    """For a process that is started: without what trainings in this one have set for themselves."""
    own = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in own and not k.startswith("ACCELERATE_")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def write_toy_data(folder: Path, n_train: int = 24, n_val: int = 6):
    """Conversations of every form, the same on every call."""
    rng = random.Random(0)
    for split, n in (("train", n_train), ("val", n_val)):
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for i in range(n):
            turns = []
            for turn in range(1 + i % 3):
                names = []
                for k in range((i + turn) % 3):  # none, one or two
                    names.append(f"{split}/{i}.{turn}.{k}.png")
                    size, grey = (rng.randint(20, 200), rng.randint(20, 200)), rng.randint(0, 255)
                    Image.new("RGB", size, (grey, 40, 200)).save(folder / "images" / names[-1])
                answer = " ".join(rng.choice(("yes", "no", "True", "SlideUp")) for _ in range(rng.randint(1, 7)))
                turns.append({"images": names, "user": "Where is it? " * rng.randint(1, 9), "assistant": answer})
            lines.append(json.dumps({"id": f"{split}-{i}", "source": "toy", "conversations": turns}))
        (folder / f"ucf101_{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_toy_data(folder)
    return folder
