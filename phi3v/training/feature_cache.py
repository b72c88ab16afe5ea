"""Features of images, as a frozen vision model gives them, kept on disk over epochs and runs.

A file an image, `FOLDER/<model>/<image>.safetensors`: the rows of `Phi3VImageEmbedding` without the separators. The
model's part of the name follows from all that the features depend on, the image's from its content, so that nothing
old is ever taken for something new.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import ranks
from ..data.conversations import ConversationDataset, encode_images
from ..data.images import image_name
from ..errors import InputError
from ..files import replacing
from ..model.modeling_phi3v import Phi3VForCausalLM
from .checkpoints import Interrupted, ignore_signals
from .measuring import wait_for_device

TIMED = 8  # images a rank after which reading is compared with computing
FORMAT = 1  # one more wherever crops or features are computed otherwise than before


class FeatureCache:
    """Reads features; what it returns stands where crops would.

    folder: of one model's features. rows: of a crop; width: of a row.
    """

    def __init__(self, folder: Path, rows: int, width: int, dtype: torch.dtype):
        self.folder, self.rows, self.width, self.dtype = folder, rows, width, dtype

    def path(self, image) -> Path:
        return self.folder / f"{_digest(image)}.safetensors"

    def read(self, images: Sequence) -> tuple[torch.Tensor, list[tuple[int, int]]]:
        """(n_crops * rows, width) features of all images, and each image's (down, across) sub-crops.

        Raises InputError for an image that can't be read, or whose features are missing or damaged.
        """
        features, grids = [torch.zeros(0, self.width, dtype=self.dtype)], []
        for image in images:
            path = self.path(image)
            try:
                content = load_file(path)
                features.append(content["features"])
                grids.append(tuple(content["grid"].tolist()))
            except (OSError, SafetensorError, KeyError) as e:
                raise InputError(
                    f"{path}, the features of {image_name(image)}, can't be read ({e}): all nodes must see "
                    "the folder; delete the file, if it is there, and start again"
                ) from None
        return torch.cat(features), grids

    def blank(self, grids: list[tuple[int, int]]) -> torch.Tensor:
        """For images of these sub-crops that nothing is known of."""
        return torch.zeros(sum(h * w + 1 for h, w in grids) * self.rows, self.width, dtype=self.dtype)


def _digest(image) -> str:
    """Of the image's file, or of the pixels of one in memory. Raises InputError for a file that can't be read."""
    if isinstance(image, Image.Image):
        content = repr((image.mode, image.size, image.getpalette())).encode() + image.tobytes()
        return hashlib.sha256(content).hexdigest()[:32]
    content = image.get("bytes") if isinstance(image, dict) else None
    if content is None:
        try:
            content = Path(image["path"] if isinstance(image, dict) else image).read_bytes()
        except (OSError, TypeError) as e:
            raise InputError(f"{image_name(image)} can't be read ({e})") from None
    return hashlib.sha256(content).hexdigest()[:32]


class _Missing(Dataset):
    """For an example each, path, tiles and grid of its images that have no features yet and can be read."""

    def __init__(self, dataset: ConversationDataset, examples: list[int], cache: FeatureCache):
        self.dataset, self.examples, self.cache = dataset, examples, cache

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i: int) -> list[tuple]:
        missing = []
        for turn in self.dataset.conversations[self.examples[i]]["conversations"]:
            for image in turn["images"]:
                try:
                    if not (path := self.cache.path(image)).is_file():
                        missing.append((path, *encode_images(self.dataset.processor, [image])))
                except InputError:
                    if not self.dataset.skip_bad:  # otherwise training meets it again, and says so
                        raise
        return missing


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
    decided: bool | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Has `dataset` give features in place of crops, after computing those that are not in `folder` yet; all ranks
    share the work. Where it would not pay or has no room, leaves `dataset` as it is. Returns what to tell about it.

    model: a Phi3VForCausalLM, or one with adapters, whose vision part is frozen.
    dataset: with its `sizes`, as `all_sizes` finds them.
    limit: bytes that the folder may hold, whatever is in it from before.
    decided: whether a run that is gone on with has cached, so that it goes on alike; None to find out.
    is_stopped: looked at after every image; where it says so on any rank, all raise Interrupted.
    Raises InputError for a folder that can't be written, an image that can't be read, and features that a run can't
    go on with for lack of room.
    """
    rank, world_size = ranks.rank(), ranks.world_size()
    model = next(module for module in model.modules() if isinstance(module, Phi3VForCausalLM))
    vision, processor = model.model.vision_embed_tokens.to(device), dataset.processor
    autocast = compute_dtype != torch.float32
    dtype = compute_dtype if autocast else vision.glb_GN.dtype
    cache = FeatureCache(
        Path(folder) / _model_key(vision, processor, dtype), vision.grid**2, model.config.hidden_size, dtype
    )
    examples, crops = _distinct(dataset)
    needed = crops * cache.rows * cache.width * dtype.itemsize
    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
        own, others = _bytes(cache.folder), _bytes(Path(folder))
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise InputError(f"--cache_vision_features {folder} can't be made ({e.strerror}): choose another") from None
    room = min(limit - (others - own), free + own)
    if not all(gather_object([needed <= room])):
        message = (
            f"the features of {crops:,} crops are not cached: they take {needed / 2**30:.1f} GiB, and {folder} has "
            f"room for {max(room, 0) / 2**30:.1f}; raise --cache_vision_gib, or delete what is in it from other runs"
        )
        if decided:
            raise InputError(f"{message}; the run that is gone on with had them")
        return message
    loader = DataLoader(
        _Missing(dataset, examples[rank::world_size], cache),
        batch_size=None,
        collate_fn=list,  # as it is
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
    )
    computing, reading, made = 0.0, 0.0, []
    was_training = vision.training
    vision.eval()
    bar = tqdm(loader, desc="caching vision features", disable=disable_tqdm or rank != 0)
    images = (image for missing in bar for image in missing)

    def compute(path, tiles, grids) -> float:
        """Seconds without writing."""
        start = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=autocast):
            pixels = processor.image_processor.crops_of_tiles(tiles.to(device), grids, vision.glb_GN.dtype)
            features = vision(pixels)[:-2].to(dtype)
        wait_for_device()
        seconds = time.perf_counter() - start
        write_features(path, features, grids[0])
        made.append(path)
        return seconds

    def together() -> list[tuple]:
        ranks = gather_object([(len(made), computing, reading, is_stopped())])
        if any(stopped for *_, stopped in ranks):
            raise Interrupted
        return ranks

    for image in itertools.islice(images, TIMED) if decided is None else ():
        seconds = compute(*image)
        if len(made) > 1:  # the first one also waits for what a device sets up
            computing += seconds
            reading += reading_seconds(image[0])
        if is_stopped():
            break
    _, computed, read, _ = map(sum, zip(*together(), strict=True))
    if decided is False or read > computed:
        vision.train(was_training)
        for path in made:
            path.unlink(missing_ok=True)
        if decided is False:
            return "vision features are not cached, as in the run that is gone on with"
        return (
            f"vision features are not cached: reading them takes {read / computed:.1f} times as long as computing them"
        )
    for image in images:
        compute(*image)
        if is_stopped():
            break
    new = sum(count for count, *_ in together())
    vision.train(was_training)
    dataset.feature_cache = cache
    return (
        f"the features of {crops:,} crops ({needed / 2**30:.2f} GiB) are read from {cache.folder}; {new:,} images are "
        "new there"
    )


def _model_key(vision, processor, dtype: torch.dtype) -> str:
    image_processor = processor.image_processor
    facts = [FORMAT, str(dtype), image_processor.num_crops, image_processor.image_mean, image_processor.image_std]
    digest = hashlib.sha256(repr(facts).encode())
    for name, tensor in sorted(vision.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _distinct(dataset: ConversationDataset) -> tuple[list[int], int]:
    """One example for each set of images that examples have, and how many crops these have."""
    examples, crops, seen = [], 0, set()
    for i, size in enumerate(dataset.sizes):
        key = dataset.images_key(i)
        if size.crops and (key is None or key not in seen):
            seen.add(key)
            examples.append(i)
            crops += size.crops
    return examples, crops


def _bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another run may rename it just now
            total += path.stat().st_size if path.is_file() else 0
    return total


def write_features(path: Path, features: torch.Tensor, grid: tuple[int, int]):
    """Writes an image's features, whole or not at all; two runs may write the same. Raises InputError."""
    content = {"features": features.cpu(), "grid": torch.tensor(grid)}
    try:
        with replacing(path, durable=False, several_writers=True) as partial:
            save_file(content, partial)
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path} can't be written ({' '.join(str(e).split())}): free some room") from None


def reading_seconds(path: Path) -> float:
    """What it takes to read a file that is no longer in memory, as far as the system can be told to forget it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    load_file(path)["features"].clone()
    return time.perf_counter() - start
