"""What `--report_to` names: the same names in every tracker, and the evaluations before and after training.

The Trainer's own callbacks send what is logged while it trains, and stop listening when training ends. Here they are
kept listening until the last evaluation, whose examples they get too, as a table and images.
"""

import atexit
import html
from collections.abc import Callable

from PIL import Image
from transformers.integrations import integration_utils

from ..data.images import read_image
from ..errors import InputError

PERFORMANCE = ("images_per_second", "tokens_per_second", "mfu", "peak_memory_gib")
SHOWN = 16  # examples
SIDE = 256  # pixels, of a picture at most


def rewrite_logs(logs: dict) -> dict:
    """Names as trackers show them: train/loss, eval/accuracy, perf/mfu."""
    named = {}
    for key, value in logs.items():
        part = "eval" if key.startswith("eval_") else "perf" if key in PERFORMANCE else "train"
        named[f"{part}/{key.removeprefix('eval_')}"] = value
    return named


class Trackers:
    """The trackers of a Trainer, open until `close`."""

    def __init__(self, trainer):
        integration_utils.rewrite_logs = rewrite_logs  # which all of them look up there
        self.trainer = trainer
        atexit.register(self.close)  # however the run ends
        callbacks = trainer.callback_handler.callbacks
        self.callbacks = [c for c in callbacks if type(c).__module__ == integration_utils.__name__]
        for callback in self.callbacks:
            callback.on_train_end = lambda *args, **kwargs: None  # until `close`
            if isinstance(callback, integration_utils.TensorBoardCallback) and callback.logging_dir is None:
                # Its default holds only once training has begun.
                callback.logging_dir = f"{trainer.args.output_dir}/{integration_utils.default_logdir()}"

    def _event(self) -> tuple:
        return self.trainer.args, self.trainer.state, self.trainer.control

    def log(self, logs: dict):
        """What the Trainer does not log itself, in the step that it has come to. Every rank calls it."""
        self.trainer.state.is_world_process_zero = self.trainer.is_world_process_zero()  # set once training begins
        for callback in self.callbacks:
            callback.on_log(*self._event(), model=self.trainer.model, logs=logs)

    def log_samples(self, report: dict, before: dict | None, examples: Callable[[int], dict]):
        """Some predictions with what was asked. report, before: as `Evaluation.report` returns them, the last one and
        the one before training; examples: as `write_html_report` takes it. Rank 0 calls it."""
        rows = []
        count = len(report["predictions"])
        for i in range(0, count, max(1, count // SHOWN))[:SHOWN] if self.callbacks else ():
            row, example = report["predictions"][i], examples(i)
            earlier = before["predictions"][i]["prediction"] if before else ""
            texts = [row["id"], example["question"], " | ".join(row["answers"]), earlier, row["prediction"]]
            rows.append([side_by_side(example["images"]), *map(str, texts), row["score"]])
        columns = ["images", "id", "question", "answers", "before", "after", "score"]
        for callback in self.callbacks if rows else ():
            if isinstance(callback, integration_utils.TensorBoardCallback):
                _to_tensorboard(callback.tb_writer, columns, rows, self.trainer.state.global_step)
            elif isinstance(callback, integration_utils.WandbCallback):
                _to_wandb(callback._wandb, columns, rows)
            elif isinstance(callback, integration_utils.TrackioCallback):
                _to_trackio(callback._trackio, columns, rows)

    def close(self):
        atexit.unregister(self.close)
        for callback in self.callbacks:
            end = type(callback).on_train_end
            end(callback, *self._event(), model=self.trainer.model, processing_class=self.trainer.processing_class)
        self.callbacks = []


def side_by_side(images: list) -> Image.Image | None:
    """One picture of all images that can be read; None where there is none."""
    small = []
    for image in images:
        try:
            small.append(read_image(image))
        except InputError:
            continue
        small[-1].thumbnail((SIDE, SIDE))
    if not small:
        return None
    whole = Image.new("RGB", (sum(image.width for image in small), max(image.height for image in small)))
    x = 0
    for image in small:
        whole.paste(image, (x, 0))
        x += image.width
    return whole


def _to_tensorboard(writer, columns, rows, step):
    import numpy as np

    for i, (image, *_) in enumerate(rows):
        if image is not None:
            writer.add_image(f"eval_samples/{i}", np.asarray(image), step, dataformats="HWC")
    cells = [columns[1:], ["---"] * (len(columns) - 1), *(row[1:] for row in rows)]
    lines = ["|".join(html.escape(" ".join(str(cell).split())).replace("|", "&#124;") for cell in row) for row in cells]
    writer.add_text("eval_samples", "\n".join(f"|{line}|" for line in lines), step)
    writer.flush()


def _to_wandb(wandb, columns, rows):
    pictures = [wandb.Image(row[0], caption=f"{row[2]} {row[5]}") for row in rows if row[0] is not None]
    table = wandb.Table(columns=columns[1:], data=[row[1:] for row in rows])
    wandb.log({"eval/samples": table, **({"eval/sample_images": pictures} if pictures else {})})


def _to_trackio(trackio, columns, rows):
    import pandas

    table = [[image and trackio.Image(image), *rest] for image, *rest in rows]
    trackio.log({"eval/samples": trackio.Table(dataframe=pandas.DataFrame(table, columns=columns))})
