"""What a command line sets: the presets of the published results, and what a resumed run keeps."""

import pytest
from helpers import CHECKPOINT, GOLDEN, parse_command

import finetune_hf_trainer_docvqa as docvqa
import finetune_hf_trainer_hateful_memes as hateful_memes
import finetune_hf_trainer_nlvr2 as nlvr2
import finetune_hf_trainer_ucf101 as script
from phi3v.errors import InputError
from phi3v.training import hardware

# --preset

PUBLISHED = [  # as published: script, preset, what is set
    (docvqa, "full", {"learning_rate": 5e-6, "num_train_epochs": 2, "batch_size": 64, "full_train": True}),
    (docvqa, "frozen", {"learning_rate": 1e-4, "num_train_epochs": 2, "freeze_vision_model": True}),
    (docvqa, "lora", {"learning_rate": 2e-4, "lora_rank": 32, "alpha": 16, "use_lora": True, "use_qlora": False}),
    (docvqa, "qlora", {"learning_rate": 2e-4, "lora_rank": 32, "alpha": 16, "use_lora": True, "use_qlora": True}),
    (hateful_memes, "full", {"learning_rate": 5e-5, "num_train_epochs": 2, "use_lora": False}),
    (hateful_memes, "frozen", {"learning_rate": 1e-4, "num_train_epochs": 3}),
    (hateful_memes, "lora", {"learning_rate": 2e-4, "num_train_epochs": 2, "lora_rank": 128, "alpha": 256}),
    (hateful_memes, "qlora", {"learning_rate": 2e-4, "num_train_epochs": 2, "lora_rank": 128, "alpha": 256}),
    (nlvr2, "full", {"learning_rate": 1e-5, "num_train_epochs": 3}),
    (nlvr2, "frozen", {"learning_rate": 2e-5, "num_train_epochs": 2, "freeze_vision_model": True}),
]


@pytest.mark.parametrize("task, preset, wanted", PUBLISHED)
def test_a_preset_has_the_published_settings(tmp_path, task, preset, wanted):
    args, training_args = parse_command(task, ["--output_dir", str(tmp_path), "--preset", preset])
    values = training_args.to_dict() | vars(args) | {"alpha": args.lora_alpha_ratio * args.lora_rank}
    assert {name: values[name] for name in wanted} == wanted and args.batch_size == 64
    assert (training_args.deepspeed is None) == args.use_lora


def test_a_flag_overrides_the_preset(tmp_path):
    flags = ["--output_dir", str(tmp_path), "--preset", "lora", "--learning_rate", "1e-4", "--batch_size", "8"]
    args, training_args = parse_command(docvqa, flags)
    assert (training_args.learning_rate, args.batch_size, args.lora_rank) == (1e-4, 8, 32)


@pytest.mark.parametrize("task, preset, said", [(nlvr2, "lora", "must be full, frozen"), (script, "full", "no result")])
def test_an_unknown_preset_is_an_error(tmp_path, task, preset, said):
    with pytest.raises(InputError, match=f"--preset.*{said}"):
        parse_command(task, ["--output_dir", str(tmp_path), "--data_dir", str(tmp_path), "--preset", preset])


def test_a_run_that_began_with_sdpa_attention_resumes_with_it(tmp_path, monkeypatch):
    """Checkpoints of 801afc1 were written before torch's own flash attention was used."""
    monkeypatch.setattr(hardware, "_missing_for_flash", lambda kind, precision: None)
    flags = [
        "--data_dir",
        str(tmp_path),
        "--model_name_or_path",
        str(CHECKPOINT),
        "--output_dir",
        str(tmp_path),
        "--bf16",
    ]
    resumed = ["--resume_from_checkpoint", str(GOLDEN / "checkpoint_801afc1" / "full" / "checkpoint-2")]

    def chosen(*more):
        return parse_command(script, [*flags, *more])[0].attn_implementation

    assert chosen() == "flash_attention_2" and chosen(*resumed) == "sdpa"
    assert chosen(*resumed, "--attn_implementation", "varlen") == "varlen"
