"""Folders of strangers: whatever is wrong with a file is one clear line, before a library reads it."""

import json
import shutil
import socket

import pytest
from bad_models import FILES, PROCESSORS
from helpers import CHECKPOINT

from phi3v import Phi3VProcessor
from phi3v.errors import InputError
from phi3v.model.folder import check_files
from phi3v.model.loading import find_saved


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_named(name, copy):
    change, message = FILES[name]
    change(copy)
    with pytest.raises(InputError) as error:
        find_saved(str(copy))
    assert message in str(error.value) and str(copy) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_processor_that_cannot_be_used(name, copy):
    change, message = PROCESSORS[name]
    change(copy)
    with pytest.raises((OSError, ValueError), match=message):  # both are one line at the end of a script
        Phi3VProcessor.from_pretrained(copy)


def test_the_library_checks_the_files_too(copy):
    change, message = FILES["pattern"]
    change(copy)
    with pytest.raises(ValueError, match=message):
        Phi3VProcessor.from_pretrained(copy)


def test_a_socket_is_an_error(copy):
    (copy / "added_tokens.json").unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(copy / "added_tokens.json"))
        with pytest.raises(InputError, match="not a regular file|can't be read"):
            check_files(copy)


def test_links_into_the_cache_of_the_hub_are_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(CHECKPOINT.iterdir()):
        shutil.copy(path, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number}")
    assert find_saved(str(tmp_path / "snapshot")).adapter is None
    Phi3VProcessor.from_pretrained(tmp_path / "snapshot")


def test_other_settings_of_a_processor_are_kept(copy):
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_crops": 7, "note": "mine"}))
    image_processor = Phi3VProcessor.from_pretrained(copy).image_processor
    assert image_processor.num_crops == 7 and image_processor.note == "mine"
