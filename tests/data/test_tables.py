"""Tables that cannot be used are refused with the reason, and nothing outside of their folder is read."""

import bad_tables
import datasets
import pytest
from bad_tables import load_pairs
from helpers import png_cell

from phi3v.data.images import image_size, read_image
from phi3v.data.seen_images import without_seen_images
from phi3v.data.tables import load_table, undecoded
from phi3v.errors import BadExamples, InputError
from phi3v.training.feature_files import FeatureCache


@pytest.mark.parametrize(
    ("repo", "config", "split", "columns", "message"),
    [
        ("a/nowhere", None, "train", {}, "holds no folder nowhere"),
        ("a/the_cauldron", "chartqa", "train", {}, "can't be loaded"),
        ("a/the_cauldron", "nlvr2", "test", {}, "has no split 'test', only train"),
        ("a/the_cauldron", "nlvr2", "train[600:]", {}, "is empty: it has 503 rows"),
        ("a/the_cauldron", "nlvr2", "train", {"image": str}, "has no column 'image', only images, texts"),
        ("a/the_cauldron", "nlvr2", "train", {"images": [str]}, "column 'images' is List"),
        ("a/the_cauldron", "nlvr2", "train", {"images": datasets.Image}, "column 'images' is List"),
        ("a/the_cauldron", "nlvr2", "train", {"texts": [{"question": str}]}, "column 'texts' is List"),
    ],
)
def test_a_table_that_cannot_be_used(repo, config, split, columns, message, toy_tables):
    with pytest.raises(InputError, match=message):
        load_table(repo, config, split, str(toy_tables), columns)


def test_images_of_a_table_lie_below_its_folder(tmp_path, secret, no_network):
    folder, paths = tmp_path / "the_cauldron", bad_tables.paths_outside(secret)
    file = bad_tables.cauldron_file(tmp_path, [bad_tables.image_in(path) for path in paths.values()])
    (folder / "link.png").symlink_to(secret)
    (folder / "away").symlink_to(tmp_path)
    table = load_pairs(tmp_path)
    for row, name in enumerate(paths):
        (image,) = undecoded(table, row)["images"]
        for read in (read_image, image_size, FeatureCache(tmp_path, 1, 1, None).path):
            with pytest.raises(InputError, match=rf"row {row} of {file.name}\): its image 1 can't be read") as error:
                read(image)
            assert "\x1b" not in str(error.value) and "\n" not in str(error.value), name
        with pytest.raises(InputError, match=rf"row {row} of {file.name}\): its image can't be read"):
            without_seen_images(table.select([row]), table.select([row]))
    # What lies below is read, also by its whole path.
    for name in ("a.png", "pictures/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(secret.read_bytes())
    inside = ["a.png", str(folder / "a.png"), "pictures/a.png", "./pictures/../a.png"]
    bad_tables.cauldron_file(tmp_path, [bad_tables.image_in(path) for path in inside])
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "the_cauldron").symlink_to(folder)
    for data_dir in (tmp_path, tmp_path / "link"):
        table = load_pairs(data_dir)
        assert all(image_size(undecoded(table, row)["images"][0]) == (30, 20) for row in range(len(inside)))


def test_unreadable_images_are_an_error_or_left_out(tmp_path):
    bad, path = {"bytes": b"no image", "path": "a.png"}, None
    rows = [bad_tables.GOOD | {"images": images} for images in ([bad], [png_cell(3)], [None], None, [png_cell(4), bad])]
    path = bad_tables.cauldron_file(tmp_path, rows)
    table = load_pairs(tmp_path)
    for train, evaluation in ((table, table.select([1])), (table.select([1]), table)):
        with pytest.raises(InputError, match=rf"row 0 \(row 0 of {path.name}\): its image can't be read"):
            without_seen_images(train, evaluation)
    kept = without_seen_images(table, table.select([1]), BadExamples(skip=True))
    assert kept["row_in_split"] == [0, 2, 3, 4]  # training leaves them out, with their names
    for row in (0, 2, 3):
        with pytest.raises(InputError, match=rf"row {row} .*: its image 1 can't be read"):
            read_image(undecoded(table, row)["images"][0])
