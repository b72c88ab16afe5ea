"""Checkpoints that the code of commit 801afc1 wrote can be resumed by every later version.

tests/golden/checkpoint_801afc1/README.md says how they were made. A setting that their complete.json lacks, because its
flag came later, must count as the flag's default of then.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from packaging.version import Version
from safetensors.torch import load_file

import finetune_hf_trainer_ucf101 as script

FIXTURE = Path("tests/golden/checkpoint_801afc1")  # relative, because a checkpoint remembers its model's path as given
SETTINGS = "--fp32 --attn_implementation sdpa --num_crops 2 --batch_size 2 --max_steps 4 --save_steps 2".split()
SETTINGS += "--logging_steps 1 --learning_rate 1e-3 --max_new_tokens 2 --no_eval_before --no_tqdm".split()
SETTINGS += ["--dataloader_num_workers", "0", "--data_dir", str(FIXTURE / "data")]
LORA = "--model_name_or_path demo/base_checkpoint --use_lora --lora_rank 2 --lora_dropout 0.1".split()
FULL_UNDER_ZERO2 = ["--model_name_or_path", str(FIXTURE / "tiny_model")]


@pytest.mark.parametrize(
    ("mode", "flags", "final_weights"),
    [("lora", LORA, "adapter_model.safetensors"), ("full", FULL_UNDER_ZERO2, "model.safetensors")],
)
def test_a_checkpoint_of_801afc1_resumes_to_the_weights_of_the_uninterrupted_run(
    mode, flags, final_weights, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(ROOT)
    shutil.copytree(FIXTURE / mode / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = script.main([*SETTINGS, *flags, "--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"])
    assert f"resuming from {tmp_path / 'checkpoint-2'}" in capfd.readouterr().out
    assert trainer.state.global_step == 4 and (tmp_path / "checkpoint-4").is_dir()
    state = json.loads((FIXTURE / mode / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert losses[:2] == state["log_history"] and [entry["step"] for entry in losses[2:]] == [3, 4]
    if mode == "lora" and Version(torch.__version__).release < (2, 14):
        pytest.skip("it resumed; its dropout was drawn by torch 2.14, and older versions may draw other random numbers")
    expected, found = load_file(FIXTURE / mode / final_weights), load_file(tmp_path / final_weights)
    earlier = load_file(FIXTURE / mode / "checkpoint-2" / final_weights)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    # Steps 3 and 4 change the weights by far more than this tolerance.
    assert max((expected[name] - earlier[name]).abs().max().item() for name in expected) > 1e-4
