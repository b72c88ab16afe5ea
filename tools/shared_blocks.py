"""The blocks between `# shared: NAME` and `# end shared` that must be the same in all four scripts.

`make shared`, which runs this program, copies them from the first script, finetune_hf_trainer_docvqa.py, to the others
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(ROOT.glob("finetune_hf_trainer_*.py"))
BLOCK = re.compile(r"^ *# shared: (\w+)\n.*?^ *# end shared\n", re.DOTALL | re.MULTILINE)


def blocks(source: str) -> dict[str, str]:
    return {match[1]: match[0] for match in BLOCK.finditer(source)}


def with_blocks(source: str, wanted: dict[str, str]) -> str:
    return BLOCK.sub(lambda match: wanted[match[1]], source)


def main():
    first, *others = SCRIPTS
    wanted = blocks(first.read_text(encoding="utf-8"))
    for script in others:
        source = script.read_text(encoding="utf-8")
        if (rewritten := with_blocks(source, wanted)) != source:
            script.write_text(rewritten, encoding="utf-8")
            print(f"{script.name}: rewritten from {first.name}")


if __name__ == "__main__":
    main()
