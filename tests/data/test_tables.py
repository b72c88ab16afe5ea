"""Tables that cannot be used are refused with the reason."""

import datasets
import pytest

from phi3v.data.tables import load_table
from phi3v.errors import InputError


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
