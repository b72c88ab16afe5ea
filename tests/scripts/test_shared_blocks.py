"""The blocks that several scripts share are equal in all of them."""

from tools import shared_blocks

SOURCES = [script.read_text(encoding="utf-8") for script in shared_blocks.SCRIPTS]


def test_shared_blocks_are_equal_in_all_scripts_that_have_them():
    wanted = shared_blocks.source_blocks(SOURCES)
    assert wanted.keys() >= {"flags", "model", "training", "score"}
    for script, source in zip(shared_blocks.SCRIPTS, SOURCES, strict=True):
        for name, block in shared_blocks.blocks(source).items():
            assert block == wanted[name], f"{script.name}: {name}; `make shared` makes them equal"


def test_the_first_marker_says_what_the_blocks_are_for():
    first = next(line for line in SOURCES[0].splitlines() if "# shared:" in line)
    assert first.strip().startswith("# shared: ctrl-c. A block between")


def test_a_changed_block_is_found_and_rewritten():
    changed = SOURCES[1].replace('"learning_rate": 4e-5', '"learning_rate": 3e-5')
    wanted = shared_blocks.source_blocks([SOURCES[0], changed])
    assert changed != SOURCES[1] and shared_blocks.blocks(changed)["flags"] != wanted["flags"]
    assert shared_blocks.with_blocks(changed, wanted) == SOURCES[1]


def test_a_block_comes_from_the_first_script_that_has_it():
    wanted = shared_blocks.source_blocks(SOURCES)
    assert wanted["score"] == shared_blocks.blocks(SOURCES[1])["score"]
