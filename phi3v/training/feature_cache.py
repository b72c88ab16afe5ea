"""Computes what a frozen vision model makes of each image once, and keeps it on disk for later epochs and runs."""

import contextlib
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import Dataset
from tqdm import tqdm

from .. import ranks
from ..data.conversations import ConversationDataset, encode_images
from ..data.loading import batches_of, largest_batch, make_loader
from ..errors import InputError
from ..model.adapters import inner_model
from ..model.modeling_phi3v import Phi3VForCausalLM, Phi3VImageEmbedding
from .feature_files import FeatureCache, all_finite, bytes_in, reading_seconds, write_features
from .hardware import compute_dtype, wait_for_device
from .stopping import Interrupted

TIMED_IMAGES = 8  # on each rank, before reading is compared with computing
FORMAT = 1  # must be raised whenever the way in which crops or features are computed changes


class _MissingImages(Dataset):
    """Item i is a list of (path, tiles, grids, is_damaged), for the images of `examples[i]` that have no features in
    the cache, or a file there that does not fit the image."""

    def __init__(self, dataset: ConversationDataset, examples: list[int], cache: FeatureCache):
        self.dataset, self.examples, self.cache = dataset, examples, cache

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i: int) -> list[tuple]:
        missing = []
        for turn in self.dataset.conversations[self.examples[i]]["conversations"]:
            for image in turn["images"]:
                try:
                    path, (grid,) = self.cache.path(image), self.dataset.grids([image])
                    is_damaged = os.path.lexists(path)
                    with contextlib.suppress(OSError, ValueError, SafetensorError):
                        self.cache.check_shape(path, grid)
                        continue
                    missing.append((path, *encode_images(self.dataset.processor, [image]), is_damaged))
                except InputError:
                    if not self.dataset.skip_bad:  # if bad examples are skipped, training reports this image
                        raise
        return missing


class _FeatureWriter:
    """Computes the features of images and writes them to the cache."""

    def __init__(self, vision: Phi3VImageEmbedding, image_processor, cache: FeatureCache, device, autocast: bool):
        self.vision, self.image_processor, self.cache = vision, image_processor, cache
        self.device, self.autocast = device, autocast
        self.written: list[Path] = []
        self.replaced = 0  # of these, how many were damaged before

    def write(self, path: Path, tiles: torch.Tensor, grids: list[tuple[int, int]], is_damaged: bool) -> float:
        """Computes and writes the features of one image. Returns the seconds that computing took."""
        start = time.perf_counter()
        with torch.autocast(self.device.type, self.cache.dtype, enabled=self.autocast):
            pixels = self.image_processor.crops_of_tiles(tiles.to(self.device), grids, self.vision.glb_GN.dtype)
            features = self.vision(pixels)[:-2].to(self.cache.dtype)  # without the two separators
        wait_for_device()
        seconds = time.perf_counter() - start
        if not all_finite(features):
            raise InputError(
                f"--cache_vision_features: the vision model computes NaN or infinite features, for {path}: look at "
                "its weights, or train with --bf16 or --fp32"
            )
        write_features(path, features, grids[0])
        self.written.append(path)
        self.replaced += is_damaged
        return seconds

    def write_all(self, images: Iterable[tuple], is_stopped: Callable[[], bool]) -> tuple[int, int]:
        """Writes the features of these images. Returns how many images of all ranks have been written so far, and how
        many of them were damaged before."""
        for image in images:
            self.write(*image)
            if is_stopped():
                break
        counts = _gather_unless_stopped((len(self.written), self.replaced), is_stopped)
        return tuple(map(sum, zip(*counts, strict=True)))

    def reading_and_computing(self, images: Iterator[tuple], is_stopped: Callable[[], bool]) -> tuple[float, float]:
        """Writes the features of the next TIMED_IMAGES images. Returns the seconds that reading them again takes, and
        those that computing them has taken, in total over all ranks."""
        reading = computing = 0.0
        for image in itertools.islice(images, TIMED_IMAGES):
            seconds = self.write(*image)
            if len(self.written) > 1:  # the first image also waits for what the device sets up
                computing += seconds
                reading += reading_seconds(image[0])
            if is_stopped():
                break
        return tuple(map(sum, zip(*_gather_unless_stopped((reading, computing), is_stopped), strict=True)))

    def delete_written(self):
        for path in self.written:
            path.unlink(missing_ok=True)


def _gather_unless_stopped(values: tuple, is_stopped: Callable[[], bool]) -> list[tuple]:
    """The values of every rank. Raises Interrupted on all ranks if any of them is to stop."""
    gathered = gather_object([(values, is_stopped())])
    if any(stopped for _, stopped in gathered):
        raise Interrupted
    return [values for values, _ in gathered]


@torch.no_grad()
def cache_features(
    model: Phi3VForCausalLM,
    dataset: ConversationDataset,
    folder: str | Path,
    limit: float,
    device: torch.device,
    compute_dtype: torch.dtype,
    num_workers: int = 0,
    disable_tqdm: bool = False,
    earlier_choice: bool | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Computes the features that `folder` does not hold yet, on all ranks together, and has `dataset` read features in
    place of images. Leaves `dataset` as it is if the features need too much room, or if reading them takes longer than
    computing them. Returns a line for the user that says which of these has happened.

    model: a Phi3VForCausalLM with a frozen vision model, or a PeftModel around one.
    dataset: with its `sizes`, as `all_sizes` finds them.
    limit: bytes that `folder` may hold, including what other runs have left there.
    earlier_choice: whether the run that is resumed has used cached features. The resumed run then does the same,
        because cached features differ from recomputed ones by rounding. None for a new run, which measures.
    is_stopped: called after every image. A rank on which it returns True stops after that image; all ranks raise
        Interrupted when they next exchange results.
    Raises InputError if the folder can't be written, if an image can't be read, and if there is too little room for the
    features of a run that has used them before.
    """
    vision, processor = inner_model(model).model.vision_embed_tokens.to(device), dataset.processor
    autocast = compute_dtype != torch.float32
    dtype = compute_dtype if autocast else vision.glb_GN.dtype
    name = _model_digest(vision, processor, dtype)
    cache = FeatureCache(Path(folder) / name, vision.grid**2, inner_model(model).config.hidden_size, dtype)
    examples, crops = _distinct_image_sets(dataset)
    if shortage := _shortage_of_room(cache, Path(folder), limit, crops):
        if earlier_choice:
            raise InputError(f"{shortage}; the run that is resumed has used cached features")
        return shortage
    if earlier_choice is False:
        return "vision features are not cached, because the run that is resumed has not used cached ones"
    writer = _FeatureWriter(vision, processor.image_processor, cache, device, autocast)
    images = _images_of_this_rank(dataset, examples, cache, num_workers, disable_tqdm)
    with _evaluation_mode(vision):
        if earlier_choice is None:
            reading, computing = writer.reading_and_computing(images, is_stopped)
            if reading > computing:
                writer.delete_written()
                return (
                    f"vision features are not cached, because reading them takes {reading / computing:.1f} times as "
                    "long as computing them"
                )
        written, replaced = writer.write_all(images, is_stopped)
    dataset.feature_cache = cache
    return (
        f"vision features of {crops:,} crops ({cache.bytes_of(crops) / 2**30:.2f} GiB) are read from {cache.folder}; "
        f"newly computed images: {written:,}"
        + (f", {replaced:,} of them because their files were damaged" if replaced else "")
    )


def cache_features_of_run(
    args, training_args, model, dataset, earlier_choice: bool | None, is_stopped: Callable[[], bool]
) -> str:
    """`cache_features` as a run's flags say. args: a script's flags; training_args: a TrainingArguments."""
    return cache_features(
        model,
        dataset,
        args.cache_vision_features,
        args.cache_vision_gib * 2**30,
        training_args.device,
        compute_dtype(training_args),
        num_workers=training_args.dataloader_num_workers,
        disable_tqdm=training_args.disable_tqdm,
        earlier_choice=earlier_choice,
        is_stopped=is_stopped,
    )


def _images_of_this_rank(
    dataset: ConversationDataset, examples: list[int], cache: FeatureCache, num_workers: int, disable_tqdm: bool
) -> Iterator[tuple]:
    """The (path, tiles, grids, is_damaged) of this rank's share of the images that have no features yet."""
    rank = ranks.rank()
    own = examples[rank :: ranks.world_size()]
    loader = make_loader(
        _MissingImages(dataset, own, cache),
        batch_size=None,
        collate_fn=list,  # leaves the items as they are
        num_workers=num_workers,
        batches=len(own),
        batch_bytes=largest_batch(dataset.sizes, 1, None, dataset.bytes_of_crops),
    )
    for missing in tqdm(
        batches_of(loader), desc="caching vision features", total=len(loader), disable=disable_tqdm or rank != 0
    ):
        yield from missing


@contextlib.contextmanager
def _evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def _shortage_of_room(cache: FeatureCache, folder: Path, limit: float, crops: int) -> str | None:
    """Makes the cache's folder. Returns a message if it has too little room for the features of so many crops on any
    rank. Raises InputError if the folder can't be made."""
    needed = cache.bytes_of(crops)
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        own, all_models = bytes_in(cache.folder), bytes_in(folder)
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise InputError(f"--cache_vision_features {folder} can't be made ({e.strerror}): choose another") from None
    room = min(limit - (all_models - own), free + own)
    if all(gather_object([needed <= room])):
        return None
    return (
        f"vision features are not cached: those of {crops:,} crops take {needed / 2**30:.1f} GiB, and {folder} has "
        f"room for {max(room, 0) / 2**30:.1f} GiB; raise --cache_vision_gib, or delete the features of other runs in it"
    )


def _model_digest(vision, processor, dtype: torch.dtype) -> str:
    """A digest of everything that features depend on apart from the image."""
    image_processor = processor.image_processor
    facts = [FORMAT, str(dtype), image_processor.num_crops, image_processor.image_mean, image_processor.image_std]
    facts += ["exif_rotate"] if image_processor.exif_rotate else []
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(vision.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _distinct_image_sets(dataset: ConversationDataset) -> tuple[list[int], int]:
    """One example for each distinct set of images in the data, and how many crops these examples have together."""
    examples, crops, seen = [], 0, set()
    for i, size in enumerate(dataset.sizes):
        key = dataset.images_key(i)
        if size.crops and (key is None or key not in seen):
            seen.add(key)
            examples.append(i)
            crops += size.crops
    return examples, crops
