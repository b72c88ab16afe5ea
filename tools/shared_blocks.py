"""Keeps equal the blocks between `# shared: NAME` and `# end shared`, which several training scripts have.

`make shared`, which runs this program, rewrites each block from the first script that has it. That is
finetune_hf_trainer_docvqa.py, or for a block that it lacks (`score`) the next script in alphabetical order.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST = ROOT / "finetune_hf_trainer_docvqa.py"
SCRIPTS = [FIRST, *sorted(set(ROOT.glob("finetune_hf_trainer_*.py")) - {FIRST})]
BLOCK = re.compile(r"^ *# shared: (\w+)\b[^\n]*\n.*?^ *# end shared\n", re.DOTALL | re.MULTILINE)


def blocks(source: str) -> dict[str, str]:
    """The text of each block, markers included, by name."""
    return {match[1]: match[0] for match in BLOCK.finditer(source)}


def source_blocks(sources: list[str]) -> dict[str, str]:
    """For each name, the block of the first source that has it."""
    found = {}
    for source in sources:
        found = blocks(source) | found
    return found


def with_blocks(source: str, wanted: dict[str, str]) -> str:
    return BLOCK.sub(lambda match: wanted[match[1]], source)


def main():
    wanted = source_blocks([script.read_text(encoding="utf-8") for script in SCRIPTS])
    for script in SCRIPTS:
        source = script.read_text(encoding="utf-8")
        if (rewritten := with_blocks(source, wanted)) != source:
            script.write_text(rewritten, encoding="utf-8")
            print(f"{script.name}: shared blocks rewritten")


if __name__ == "__main__":
    main()
