"""An unknown flag is answered with the known one that may have been meant, in every program."""

import argparse
import subprocess
import sys

import pytest
from helpers import ROOT, environment

import convert_ucf101
from phi3v.errors import InputError, Parser
from tools import ask, convert_conversations, merge_adapter


@pytest.mark.parametrize(
    "program, given, meant",
    [
        (convert_ucf101, "--num_frame 4", "--num_frames"),
        (convert_ucf101, "--output_dir x --workers 2", "--out_dir, --num_workers"),
        (convert_ucf101, "--foo_bar_baz", None),
        (convert_conversations, "--sourc a.csv --out_dir x", "--source"),  # which is required
        (convert_conversations, "--source a.csv --output_dir=x", "--out_dir"),
        (ask, "OUT cat.jpg --qestion What?", "--question"),
        (ask, "--qestion", "--question"),  # the folder is required
        (ask, "OUT --num-crop 4 cat.jpg", "--num_crops"),
        (merge_adapter, "OUT merged --dequantise", "--dequantize"),
        (merge_adapter, "OUT merged --foo_bar_baz", None),
    ],
)
def test_an_unknown_flag_of_a_tool_is_answered_with_the_one_that_was_meant(program, given, meant, capsys):
    hint = f" (did you mean {meant}? see --help)" if meant else " (see --help)"
    if program is convert_ucf101:
        assert program.main(given.split()) == 2
        assert capsys.readouterr().err.endswith(f"{hint}\n")
    else:
        with pytest.raises(InputError) as error:
            program.main(given.split())
        assert str(error.value).startswith("unrecognized arguments: --") and str(error.value).endswith(hint)


def test_a_flag_that_is_missing_is_still_missed_afterwards():
    parser = Parser()
    parser.add_argument("--source", required=True)
    parser.add_argument("--value", type=float)
    for given, message in (
        ([], "required: --source"),
        (["--value", "x"], "invalid float"),
        (["--value"], "expected one"),
    ):
        with pytest.raises(InputError, match=message):
            parser.parse_args(given)
    with pytest.raises(InputError, match="mean --source"):
        parser.parse_args(["--sorce", "a"])
    assert parser.parse_args(["--source", "-1"]) == argparse.Namespace(source="-1", value=None)


@pytest.mark.slow
def test_convert_ucf101_works_alone(tmp_path):
    """Without the other files of this repository, it has no hints."""
    program = "import sys; sys.modules['phi3v'] = None; import convert_ucf101; sys.exit(convert_ucf101.main())"
    command = [sys.executable, "-c", program, "--num_frame", "4"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr == "error: unrecognized arguments: --num_frame 4 (see --help)\n"
