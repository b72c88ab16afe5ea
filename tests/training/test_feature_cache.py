"""With cached vision features a frozen vision model trains the same, and encodes each image only once."""

import shutil

import bad_files
import pytest
import torch
from helpers import CHECKPOINT, SIX_STEPS, loss_by_hand, train_losses, write_written_data
from PIL import Image

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.conversations import ConversationDataset
from phi3v.data.sizes import all_sizes
from phi3v.errors import InputError
from phi3v.model.modeling_phi3v import Phi3VImageEmbedding
from phi3v.training import feature_cache
from phi3v.training.stopping import Interrupted

FROZEN = [*SIX_STEPS, "--freeze_vision_model", "--deepspeed", "none", "--max_eval_samples", "1"]


@pytest.fixture
def always_pays(monkeypatch):
    monkeypatch.setattr(feature_cache, "reading_seconds", lambda path: 0.0)


@pytest.fixture
def encoded(monkeypatch):
    """A list of how many crops each call of the tower has encoded; it grows while the test runs."""
    counted, encode = [], Phi3VImageEmbedding.encode_crops

    def counting(self, crops):
        counted.append(len(crops))
        return encode(self, crops)

    monkeypatch.setattr(Phi3VImageEmbedding, "encode_crops", counting)
    return counted


@pytest.mark.parametrize("flags", [[], ["--use_lora"], ["--batch_size_per_gpu", "4", "--no_share_images"]])
def test_training_is_the_same_with_cached_features(toy_data, tmp_path, always_pays, encoded, flags):
    plain = train_losses(toy_data, tmp_path / "plain", *FROZEN, *flags)
    without = sum(encoded)
    cache = ["--cache_vision_features", str(tmp_path / "cache")]
    cached = train_losses(toy_data, tmp_path / "cached", *FROZEN, *flags, *cache)
    assert cached[0] == pytest.approx(plain[0], rel=1e-6)
    assert cached == pytest.approx(plain, rel=2e-5)  # steps this large magnify what is rounded otherwise
    again_from = sum(encoded)
    again = train_losses(toy_data, tmp_path / "again", *FROZEN, *flags, *cache)
    assert again == cached
    in_evaluation = sum(encoded) - again_from  # after training; nothing is computed for training
    assert in_evaluation < without / 4


def test_features_of_images_inside_of_texts(made_once, tmp_path, always_pays):
    data = made_once("written", write_written_data)
    flags = (
        "--freeze_vision_model --max_steps 1 --batch_size 4 --batch_size_per_gpu 4 --deepspeed none --no_eval_before"
    )
    first = train_losses(data, tmp_path / "out", *flags.split(), "--cache_vision_features", str(tmp_path / "cache"))
    assert first == [pytest.approx(loss_by_hand(data), rel=1e-6)] and list((tmp_path / "cache").rglob("*.safetensors"))


def dataset_of(toy_data, **options):
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4)
    conversations = read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images")
    dataset = ConversationDataset(conversations, processor, **options)
    all_sizes(dataset, "sizes", disable_tqdm=True)
    return dataset


def cache(model, dataset, folder, limit=2**30, **options):
    message = feature_cache.cache_features(
        model, dataset, folder, limit, torch.device("cpu"), torch.float32, disable_tqdm=True, **options
    )
    return message, dataset.feature_cache


@pytest.fixture(scope="module")
def model():
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT)


def test_features_are_those_of_the_image_and_of_the_model(toy_data, tmp_path, always_pays, model):
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    message, first = cache(model, dataset_of(data), tmp_path / "cache")
    assert "newly computed images: " in message
    files = set(first.folder.iterdir())
    message, _ = cache(model, dataset_of(data), tmp_path / "cache")
    assert "newly computed images: 0" in message
    changed = next(path for path in sorted((data / "images" / "train").iterdir()))
    with Image.open(changed) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(changed, pnginfo=None, compress_level=0)
    message, _ = cache(model, dataset_of(data), tmp_path / "cache")
    assert "newly computed images: 1" in message and files < set(first.folder.iterdir())
    other = Phi3VForCausalLM.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        other.model.vision_embed_tokens.img_projection[2].bias[3] += 1e-3
    assert cache(other, dataset_of(data), tmp_path / "cache")[1].folder != first.folder


def test_a_resumed_run_uses_cached_features_if_it_has_used_them_before(toy_data, tmp_path, monkeypatch, model):
    monkeypatch.setattr(feature_cache, "reading_seconds", lambda path: 100.0)
    dataset = dataset_of(toy_data)
    assert "are read from" in cache(model, dataset, tmp_path, earlier_choice=True)[0] and dataset.feature_cache
    monkeypatch.setattr(feature_cache, "reading_seconds", lambda path: 0.0)
    dataset = dataset_of(toy_data)
    assert "the run that is resumed has not used" in cache(model, dataset, tmp_path, earlier_choice=False)[0]
    assert dataset.feature_cache is None
    with pytest.raises(InputError, match="--cache_vision_gib.*the run that is resumed has used"):
        cache(model, dataset_of(toy_data), tmp_path, limit=10_000, earlier_choice=True)


def test_caching_stops_at_a_signal(toy_data, tmp_path, always_pays, model):
    with pytest.raises(Interrupted):
        cache(model, dataset_of(toy_data), tmp_path, is_stopped=lambda: True)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_a_folder_without_room_or_without_gain_is_not_used(toy_data, tmp_path, monkeypatch, encoded, model):
    dataset = dataset_of(toy_data)
    message, features = cache(model, dataset, tmp_path, limit=10_000)
    assert features is None and "--cache_vision_gib" in message
    monkeypatch.setattr(feature_cache, "reading_seconds", lambda path: 100.0)
    before = sum(encoded)
    message, features = cache(model, dataset, tmp_path)
    assert features is None and "times as long" in message
    assert sum(encoded) - before <= feature_cache.TIMED_IMAGES * 5 < sum(size.crops for size in dataset.sizes)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_damaged_features_are_named(toy_data, tmp_path, always_pays, model):
    dataset = dataset_of(toy_data)
    _, features = cache(model, dataset, tmp_path)
    for path in features.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-5])
    with_images = next(i for i, size in enumerate(dataset.sizes) if size.crops)
    with pytest.raises(InputError, match="safetensors, the features of .*delete the file"):
        dataset[with_images]


def test_an_unreadable_image_is_left_out_as_without_a_cache(toy_data, tmp_path, always_pays, model):
    data = tmp_path / "data"
    shutil.copytree(toy_data, data)
    damaged = next(path for path in sorted((data / "images" / "train").iterdir()))
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=damaged.name):
        cache(model, dataset_of(data), tmp_path / "cache")
    dataset = dataset_of(data, skip_bad=True)
    cache(model, dataset, tmp_path / "cache")
    problems = [example["problem"] for example in map(dataset.__getitem__, range(len(dataset))) if "problem" in example]
    assert problems and all(damaged.name in problem for problem in problems)


def test_features_that_do_not_fit_are_computed_again(toy_data, tmp_path, always_pays, model):
    dataset = dataset_of(toy_data)
    _, features = cache(model, dataset, tmp_path)
    wanted = [dataset[i].get("features") for i in range(len(dataset))]
    files, ways = sorted(features.folder.iterdir()), ("empty", "cut", "pipe", "device", "other grid", "other dtype")
    for path, way in zip(files, ways, strict=False):
        path.unlink()
        bad_files.BAD_FEATURES[way][0](path)
    again = dataset_of(toy_data)
    message, _ = cache(model, again, tmp_path)
    n = min(len(files), len(ways))
    assert f"newly computed images: {n}, {n} of them because their files were damaged" in message and n > 3
    assert all(torch.equal(again[i]["features"], wanted[i]) for i in range(len(again)))
    message, _ = cache(model, dataset_of(toy_data), tmp_path)
    assert message.endswith("newly computed images: 0")


def test_features_that_are_not_finite_are_not_written(toy_data, tmp_path, always_pays):
    broken = Phi3VForCausalLM.from_pretrained(CHECKPOINT)
    with torch.no_grad():
        broken.model.vision_embed_tokens.img_projection[2].bias[3] = float("nan")
    with pytest.raises(InputError, match="the vision model computes NaN or infinite features"):
        cache(broken, dataset_of(toy_data), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
