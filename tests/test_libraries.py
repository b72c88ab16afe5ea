"""Libraries are loaded without what a run does not need, converters load none of the large ones, and notices that mean
nothing are not shown."""

import gc
import logging
import subprocess
import sys
import warnings

import datasets
import pytest
import torch
from helpers import ROOT, environment
from transformers.utils import logging as logging_of_transformers

from phi3v.errors import exit_on_input_error
from phi3v.libraries import hide_notices, hide_warnings, quick_imports
from phi3v.quiet import quiet_libraries


def loaded_by(program: str) -> set[str]:
    """The modules that are loaded in a new process after a program."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; import sys; print('', *sys.modules, sep='\\n')"],
        cwd=ROOT,
        env=environment(HF_HUB_OFFLINE="1"),
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert done.stderr == ""
    return set(done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("converter", ["convert_ucf101", "tools.convert_conversations"])
def test_a_converter_loads_no_large_library(converter):
    loaded = loaded_by(f"import {converter}")
    assert converter in loaded and not loaded & {"torch", "transformers", "accelerate", "datasets", "peft", "pandas"}


@pytest.mark.slow
def test_a_script_does_not_load_the_compiler_of_torch():
    """And `import phi3v`, with which it begins, registers the model with the Auto classes, and hides no warnings."""
    registered = "import warnings; before = list(warnings.filters); import phi3v; "
    registered += "from transformers import AutoConfig; AutoConfig.for_model('phi3_v'); "
    registered += "assert not any('deprecated' in str(new) for new in warnings.filters if new not in before)"
    loaded = loaded_by(f"{registered}; import finetune_hf_trainer_docvqa")
    assert {"bitsandbytes", "deepspeed", "phi3v.run"} <= loaded
    assert "torch._inductor.lowering" not in loaded


def test_a_function_that_a_library_compiles_is_compiled_when_it_is_called(monkeypatch):
    compiled = []

    def compile_now(function, **options):
        compiled.append((function.__name__, options))
        return lambda x: ("compiled", function(x))

    monkeypatch.setattr(torch, "compile", compile_now)
    with quick_imports():
        assert not gc.isenabled()

        @torch.compile(dynamic=True)
        def double(x):
            return 2 * x

        half = torch.compile(lambda x: x / 2)
    assert gc.isenabled() and torch.compile is compile_now and not compiled
    assert [double(2), double(3)] == [("compiled", 4), ("compiled", 6)] and double.__name__ == "double"
    assert half(2) == ("compiled", 1) and compiled == [("double", {"dynamic": True}), ("<lambda>", {})]


@pytest.mark.parametrize("options", [[], ["always"]])
def test_only_notices_that_mean_nothing_are_hidden(options, caplog, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", options)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        hide_notices()
        hide_warnings()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, 1)
        warnings.warn("OMP_NUM_THREADS/MKL_NUM_THREADS unset, we set it at 1 to improve oob performance.", stacklevel=1)
        warnings.warn("the weights are damaged", FutureWarning, 1)
        warnings.warn("this is deprecated", UserWarning, 1)
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from %s", "x")
    for text in ("Failed to load CPU gemm_4bit_forward from kernels-community: none", "no library"):
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning(text)
    said = [str(warning.message) for warning in shown]
    assert said[-2:] == ["the weights are damaged", "this is deprecated"]
    assert len(said) == (4 if options else 2)  # a user who asks for warnings sees all
    assert caplog.messages == ["Failed to load CPU gemm_4bit_forward from x", "no library"]


def test_a_program_hides_them_and_no_others():
    def main():
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, 1)
        warnings.warn("the weights are damaged", FutureWarning, 1)

    with warnings.catch_warnings(record=True) as shown, pytest.raises(SystemExit):
        warnings.simplefilter("always")
        exit_on_input_error(main)
    assert [str(warning.message) for warning in shown] == ["the weights are damaged"]


def test_no_tqdm_hides_the_bars_of_all_libraries():
    shown = datasets.are_progress_bars_disabled(), logging_of_transformers.is_progress_bar_enabled()
    try:
        datasets.enable_progress_bars()
        logging_of_transformers.enable_progress_bar()
        quiet_libraries(no_bars=False)
        assert not datasets.are_progress_bars_disabled() and logging_of_transformers.is_progress_bar_enabled()
        quiet_libraries(no_bars=True)
        assert datasets.are_progress_bars_disabled() and not logging_of_transformers.is_progress_bar_enabled()
    finally:
        (datasets.disable_progress_bars if shown[0] else datasets.enable_progress_bars)()
        (logging_of_transformers.enable_progress_bar if shown[1] else logging_of_transformers.disable_progress_bar)()
