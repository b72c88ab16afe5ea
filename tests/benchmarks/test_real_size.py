"""benchmarks/real_size.py with a small model, and how it measures memory."""

import sys

import pytest
from helpers import ROOT

import finetune_hf_trainer_ucf101 as script
from tools import merge_adapter as merge_tool

sys.path.append(str(ROOT / "benchmarks"))
import real_size  # noqa: E402


def in_this_process(command: list[str], checkout) -> real_size.Found:
    program, *argv = command
    if program == "-c":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["-c", *argv[1:]])
            exec(argv[0], {})
    else:
        {"tools/merge_adapter.py": merge_tool, "finetune_hf_trainer_ucf101.py": script}[program].main(argv)
    return real_size.Found(1.0, 2**30, 2**31)


def test_all_parts_with_a_small_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real_size, "measured", in_this_process)
    real_size.main([str(tmp_path / "a"), "--tiny"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == list(real_size.parts(tmp_path))
    assert rows[2] == "| imports       | now    |     1.0 |          1.00 |         2.00 |"
    left = {path.name for path in (tmp_path / "a").iterdir()}
    assert left == {"base", "adapter", "data", real_size.WRITTEN}
    real_size.main([str(tmp_path / "a"), "--parts", "merge", "--compare", str(ROOT)])
    assert capsys.readouterr().out.count("| merge") == 2


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(SystemExit):
        real_size.main([str(tmp_path), "--tiny"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.slow
def test_memory_of_a_process_and_its_child():
    hold = "import subprocess, sys, time; held = bytearray(200 << 20); "
    child = f"{hold} time.sleep(0.5)"
    found = real_size.measured(["-c", f"{hold} subprocess.run([sys.executable, '-c', {child!r}])"], ROOT)
    assert 400 << 20 < found.anonymous < 500 << 20 and found.resident > found.anonymous and found.seconds > 0.5
    with pytest.raises(SystemExit, match="ended with status 3"):
        real_size.measured(["-c", "raise SystemExit(3)"], ROOT)
