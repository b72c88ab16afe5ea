"""Files of vision features: named by content, written whole, read back with what is wrong named."""

import pytest
import torch
from PIL import Image

from phi3v.errors import InputError
from phi3v.training.feature_files import FeatureCache, bytes_in, write_features


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "model").mkdir()
    return FeatureCache(tmp_path / "model", 4, 3, torch.float32)


def test_features_come_back_as_they_were_written(cache):
    images = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    features = [torch.randn(4 * (h * w + 1), 3) for h, w in ((1, 1), (1, 2))]
    for image, own, grid in zip(images, features, ((1, 1), (1, 2)), strict=True):
        write_features(cache.path(image), own, grid)
    read, grids = cache.read(images)
    assert torch.equal(read, torch.cat(features)) and grids == [(1, 1), (1, 2)]
    assert bytes_in(cache.folder) == sum(path.stat().st_size for path in cache.folder.iterdir())
    assert len(list(cache.folder.iterdir())) == 2


def test_the_name_of_a_file_follows_from_the_content_of_its_image(cache, tmp_path):
    image = Image.new("RGB", (4, 4), "red")
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png")
    content = (tmp_path / "a.png").read_bytes()
    assert cache.path(tmp_path / "a.png") == cache.path(tmp_path / "b.png") == cache.path({"bytes": content})
    image.putpixel((0, 0), (0, 0, 0))
    image.save(tmp_path / "b.png")
    assert cache.path(tmp_path / "a.png") != cache.path(tmp_path / "b.png")


@pytest.mark.parametrize("content", [None, b"", b"damaged"])
def test_missing_or_damaged_features_are_named(cache, content):
    image = Image.new("RGB", (4, 4))
    if content is not None:
        cache.path(image).write_bytes(content)
    with pytest.raises(InputError, match=str(cache.path(image))):
        cache.read([image])


def test_blank_features_have_the_size_of_the_image(cache):
    assert cache.blank([(1, 2), (1, 1)]).shape == (4 * 3 + 4 * 2, 3)
