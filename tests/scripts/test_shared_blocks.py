"""The four scripts agree where they must."""

from tools import shared_blocks


def test_the_shared_blocks_are_the_same_in_all_scripts():
    sources = [script.read_text(encoding="utf-8") for script in shared_blocks.SCRIPTS]
    assert len(sources) == 4
    first = shared_blocks.blocks(sources[0])
    assert list(first) == ["flags", "arguments", "model", "training"]
    for script, source in zip(shared_blocks.SCRIPTS, sources, strict=True):
        found = shared_blocks.blocks(source)
        assert list(found) == list(first), script.name
        for name, block in first.items():
            assert found[name] == block, f"{script.name}: {name}; make shared makes them equal"


def test_a_changed_block_is_found_and_rewritten():
    source = shared_blocks.SCRIPTS[1].read_text(encoding="utf-8")
    changed = source.replace('"learning_rate": 4e-5', '"learning_rate": 3e-5')
    wanted = shared_blocks.blocks(source)
    assert changed != source and shared_blocks.blocks(changed) != wanted
    assert shared_blocks.with_blocks(changed, wanted) == source
