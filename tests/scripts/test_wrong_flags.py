"""A script refuses flags and values that contradict one another or cannot work, in one line."""

import pytest
import torch
from helpers import COMMON, ROOT, arguments, parse_command, train_losses

import finetune_hf_trainer_ucf101 as script
from phi3v import arguments as arguments_module
from phi3v.errors import InputError, exit_on_input_error

WRONG = [
    ("--batch_size 0", "--batch_size is 0, must be at least 1"),
    ("--batch_size 6 --batch_size_per_gpu 4", "--batch_size 6 must be a multiple of processes x"),
    ("--batch_size x", "invalid int value: 'x'"),
    ("--num_crops 0", "--num_crops is 0, must be at least 1"),
    ("--num_crops 17", "at most 16"),
    ("--max_tokens_per_gpu 0", "--max_tokens_per_gpu must be auto, or a whole number of at least 1"),
    ("--max_tokens_per_gpu 9 --batch_size_per_gpu 2", "contradict each other"),
    ("--max_tokens_per_gpu 20", "--max_tokens_per_gpu 20 is less than"),
    ("--save_total_limit -1", "--save_total_limit is -1, must be at least 1"),
    ("--save_steps 0", "--save_steps is 0.0, must be above 0"),
    ("--save_only_model true", "--save_only_model is not accepted here"),
    ("--on_bad_example maybe", "--on_bad_example is maybe, must be error or skip"),
    ("--resume_anyway", "--resume_anyway has no effect without --resume_from_checkpoint"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint nowhere does not exist"),
    ("--estimate_gpus 8", "--estimate_gpus has no effect without --estimate"),
    ("--max_train_samples 0", "--max_train_samples is 0"),
    ("--max_eval_samples -1", "--max_eval_samples is -1"),
    ("--max_new_tokens 0", "--max_new_tokens is 0"),
    ("--model_name_or_path nowhere", "there is no such folder"),
    ("--model_name_or_path demo/nowhere", "there is no such folder"),
    ("--model_name_or_path /nowhere/at/all", "there is no such folder"),
    ("--data_dir nowhere", "--data_dir nowhere is not a folder"),
    ("--eval_split test", "has only the splits train, val"),
    ("--data_dir demo", "ucf101_train.jsonl does not exist"),
    ("--deepspeed nowhere.json", "--deepspeed nowhere.json can't be read"),
    ("--deepspeed README.md", "is not valid JSON"),
    ("--bf16 --fp16", "contradict each other"),
    ("--bf16 --fp32", "contradict each other"),
    ("--lora_rank 8", "--lora_rank has no effect without --use_lora"),
    ("--use_lora --lora_rank 0", "--lora_rank is 0"),
    ("--use_lora --lora_dropout 1", "--lora_dropout is 1.0"),
    ("--use_dora", "--use_dora has no effect without --use_lora"),
    ("--quantize_vision", "no effect without --use_qlora"),
    ("--train_projector", "no effect without --freeze_vision_model"),
    ("--use_lora --freeze_vision_model --train_projector", "--train_projector contradicts --use_lora"),
    ("--freeze_vision_model --vision_lr 1e-5", "--vision_lr contradicts --freeze_vision_model"),
    ("--use_qlora --deepspeed ds_config/zero3.json", "can't run under ZeRO-3"),
    ("--seed 4294967296", "--seed is 4294967296, must be at least 0 and at most 4294967295"),
    ("--wd -5", "--wd is -5.0, must be at least 0"),
    ("--max_grad_norm nan", "--max_grad_norm is nan, must be at least 0 and finite"),
    ("--adam_beta2 1.5", "--adam_beta2 is 1.5, must be at least 0 and below 1"),
    ("--warmup_steps nan", "--warmup_steps is nan"),
    ("--logging_steps inf", "--logging_steps is inf"),
    ("--dataloader_num_workers 5000", "--dataloader_num_workers is 5000, must be at most"),
    ("--output_dir .", "--output_dir . holds README.md, which no run of these scripts has written"),
    ("--learning_rate nan", "--learning_rate is nan, must be above 0"),
    ("--num_train_epochs 0", "--num_train_epochs is 0"),
    ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size is 0"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers is -1"),
    ("--seed -1", "--seed is -1"),
    ("--use_lora --train_separators --deepspeed ds_config/zero2.json", "can't run under DeepSpeed"),
    ("--learning_rate 0", "--learning_rate is 0.0, must be above 0"),
    ("--attn_implementation flex_attention", "is unknown"),
    ("--use_flash_attention --attn_implementation sdpa", "contradicts"),
    ("--gradient_accumulation_steps 2", "not accepted here"),
    ("--per_device_train_batch_size 2", "use --batch_size_per_gpu"),
    ("--weight_decay 0.1", "use --wd"),
    ("--torch_compile true", "every packed row has another structure"),
    ("--torch_compile_mode max-autotune", "every packed row has another structure"),
    ("--torch_compile_backend inductor", "every packed row has another structure"),
    ("--fsdp full_shard", "not accepted here"),
    ("--push_to_hub", "not accepted here"),
    ("--label_smoothing_factor=0.1", "not accepted here"),
    ("--hub_model_id me/mine", "not accepted here"),
    ("--learning_rte 1e-5", "unrecognized arguments: --learning_rte"),
    ("--learning", "unrecognized arguments: --learning"),
    ("--lr_scheduler_type triangle", "triangle"),
    ("--output_dir README.md", "--output_dir README.md can't be made"),
    ("--logging_steps ten", "ten"),
]


if not torch.accelerator.is_available():
    WRONG += [("--fp16", "--fp16 needs a GPU"), ("--use_flash_attention", "flash attention needs")]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_flags_are_one_line(flags, message, toy_data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    argv = ["--data_dir", str(toy_data), "--output_dir", str(tmp_path / "out"), *COMMON, *flags.split()]
    with pytest.raises(SystemExit) as status:
        exit_on_input_error(lambda: script.main(argv))
    assert status.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list((tmp_path).glob("out/*"))


def test_an_output_folder_with_checkpoints_is_kept(toy_data, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(InputError, match="holds checkpoints: resume with"):
        train_losses(toy_data, tmp_path)


def test_keep_best_needs_evaluations(toy_data, tmp_path):
    with pytest.raises(InputError, match="--keep_best has no effect without --eval_steps"):
        parse_command(script, arguments(toy_data, tmp_path, "--keep_best"))


@pytest.mark.parametrize("name, value", [("MIXED_PRECISION", "bf16"), ("USE_DEEPSPEED", "true"), ("USE_FSDP", "true")])
def test_accelerates_own_settings_are_refused(toy_data, tmp_path, monkeypatch, name, value):
    monkeypatch.setitem(arguments_module.LAUNCHER, f"ACCELERATE_{name}", value)
    with pytest.raises(InputError, match="accelerate launch: "):
        parse_command(script, arguments(toy_data, tmp_path))


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--freeze_vision_model", "--train_projector"],
        ["--freeze_vision_model", "--deepspeed", "ds_config/zero3.json"],
    ],
)
def test_where_the_vision_part_trains_or_is_split_there_is_no_cache(tmp_path, flags):
    argv = [*COMMON, "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), *flags]
    with pytest.raises(InputError, match="--cache_vision_features"):
        parse_command(script, [*argv, "--cache_vision_features", "cache"])
