"""The trackers that `--report_to` names, with the same names in each, and with the evaluations around the training.

The Trainer's own callbacks send to the trackers what is logged during training, and close them when training ends. Here
the trackers stay open until the evaluation after training, from which they also get some examples with their images.
"""

import atexit
from collections.abc import Callable

from PIL import Image
from transformers.integrations import integration_utils

from ..data.images import read_image
from ..errors import InputError
from ..text import markdown_text

PERFORMANCE = ("images_per_second", "tokens_per_second", "mfu", "peak_memory_gib")
SHOWN_EXAMPLES = 16
THUMBNAIL_SIDE = 256  # pixels, at most


def rewrite_logs(logs: dict) -> dict:
    """Gives what is logged the names that trackers show: train/loss, eval/accuracy, perf/mfu."""
    named = {}
    for key, value in logs.items():
        part = "eval" if key.startswith("eval_") else "perf" if key in PERFORMANCE else "train"
        named[f"{part}/{key.removeprefix('eval_')}"] = value
    return named


class Trackers:
    """The trackers of a Trainer. They stay open until `close` is called or the process ends."""

    def __init__(self, trainer):
        integration_utils.rewrite_logs = rewrite_logs  # all of the Trainer's callbacks look it up in this module
        self.trainer = trainer
        atexit.register(self.close)
        callbacks = trainer.callback_handler.callbacks
        self.callbacks = [c for c in callbacks if type(c).__module__ == integration_utils.__name__]
        for callback in self.callbacks:
            callback.on_train_end = lambda *args, **kwargs: None  # `close` calls the original
            if isinstance(callback, integration_utils.TensorBoardCallback) and callback.logging_dir is None:
                # The callback itself sets its default only when training begins, after the first evaluation.
                callback.logging_dir = f"{trainer.args.output_dir}/{integration_utils.default_logdir()}"

    def _event(self) -> tuple:
        return self.trainer.args, self.trainer.state, self.trainer.control

    def log(self, logs: dict):
        """Sends what the Trainer does not log itself, at its current step. Every rank must call it."""
        # The Trainer sets this only when training begins.
        self.trainer.state.is_world_process_zero = self.trainer.is_world_process_zero()
        for callback in self.callbacks:
            callback.on_log(*self._event(), model=self.trainer.model, logs=logs)

    def log_samples(self, report: dict, before: dict | None, examples: Callable[[int], dict]):
        """Sends some of the predictions, with images, question and right answers. Called on rank 0 alone.

        report, before: what `Evaluation.report` has returned after and before training; `before` may be None.
        examples: returns the images and the question of example i, as `Evaluation.example` does.
        """
        rows = []
        count = len(report["predictions"])
        shown = range(0, count, max(1, count // SHOWN_EXAMPLES))[:SHOWN_EXAMPLES]
        for i in shown if self.callbacks else ():
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
        """Sends what the trackers still hold, and closes them."""
        atexit.unregister(self.close)
        for callback in self.callbacks:
            end = type(callback).on_train_end
            end(callback, *self._event(), model=self.trainer.model, processing_class=self.trainer.processing_class)
        self.callbacks = []


def side_by_side(images: list) -> Image.Image | None:
    """All images that can be read in one picture, reduced in size; None if there are none."""
    small = []
    for image in images:
        try:
            small.append(read_image(image))
        except InputError:
            continue
        small[-1].thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
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
    lines = ["|".join(markdown_text(" ".join(str(cell).split())) for cell in row) for row in cells]
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
