"""Files of vision features: named by content, written whole, read back with what is wrong named."""

import os

import pytest
import torch
from bad_files import BAD_FEATURES
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
    assert torch.equal(cache.read(images, [(1, 1), (1, 2)]), torch.cat(features))
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


@pytest.mark.parametrize("name", BAD_FEATURES)
def test_features_that_do_not_fit_are_named(cache, name):
    image = Image.new("RGB", (4, 4))
    make, reason = BAD_FEATURES[name]
    make(cache.path(image))
    with pytest.raises(InputError) as error:
        cache.read([image], [(1, 2)])
    assert f"{cache.path(image)}, the features of an image, can't be read ({reason}" in str(error.value)
    assert "delete the file" in str(error.value) and "\n" not in str(error.value)


def test_an_image_that_is_no_file_is_not_read(cache, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for image in (tmp_path / "pipe", {"bytes": None, "path": str(tmp_path / "pipe")}, tmp_path, os.devnull):
        with pytest.raises(InputError, match="can't be read .not a regular file"):
            cache.path(image)


def test_blank_features_have_the_size_of_the_image(cache):
    assert cache.blank([(1, 2), (1, 1)]).shape == (4 * 3 + 4 * 2, 3)
