"""The script as it is started: one process and two, micro-batches cut in several ways, full and frozen vision."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import CHECKPOINT, ROOT, environment
from safetensors.torch import load_file, save_file

import finetune_hf_trainer_ucf101 as script
from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.data.annotations import read_conversations
from phi3v.data.conversations import Collator, ConversationDataset
from phi3v.training.evaluation import generate_answers

COMMON = ["--model_name_or_path", str(CHECKPOINT), "--num_crops", "4", "--no-tqdm", "--dataloader_num_workers", "0"]
COMMON += ["--max_new_tokens", "8", "--report_to", "none", "--logging_steps", "1"]
SIX_STEPS = "--optim sgd --learning_rate 0.05 --lr_scheduler_type constant --warmup_steps 0 --wd 0".split()
SIX_STEPS += "--max_grad_norm 0 --max_steps 6 --batch_size 4 --no_eval_before".split()

# Started by torchrun: the script, and what its weights and losses are on every rank.
DRIVER = """
import hashlib, json, os, sys
import finetune_hf_trainer_ucf101 as script


def run():
    trainer = script.main(sys.argv[1:])
    digest = hashlib.sha256()
    for name, tensor in sorted(trainer.accelerator.unwrap_model(trainer.model).state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    engine = type(trainer.model_wrapped).__name__
    path = os.path.join(trainer.args.output_dir, f"rank{os.environ['RANK']}.json")
    with open(path, "w") as file:
        json.dump({"weights": digest.hexdigest(), "losses": losses, "engine": engine}, file)


script.exit_on_input_error(run)
"""


def in_process(toy_data, output_dir, *flags):
    trainer = script.main(["--data_dir", str(toy_data), "--output_dir", str(output_dir), *COMMON, *flags])
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def torchrun(program, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    return subprocess.run([*command, *map(str, flags)], env=environment(), capture_output=True, text=True, timeout=300)


def two_ranks(toy_data, folder, *flags):
    """Runs the script on two ranks; returns what each reports of itself."""
    (folder / "driver.py").write_text(DRIVER)
    run = torchrun(folder / "driver.py", "--data_dir", toy_data, "--output_dir", folder / "out", *COMMON, *flags)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads((folder / "out" / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_process(toy_data, tmp_path_factory):
    """Six steps of SGD on four examples each, one example at a time: the numbers that every other cut must give."""
    out = tmp_path_factory.mktemp("one")
    losses = in_process(toy_data, out, *SIX_STEPS, "--deepspeed", "none", "--batch_size_per_gpu", "1")
    return losses, load_file(out / "model.safetensors")


def assert_same_run(losses, out, one_process):
    expected_losses, expected = one_process
    assert len(losses) == 6 and losses == pytest.approx(expected_losses, rel=1e-5)
    weights = load_file(out / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_all_supervised_tokens_of_a_step(toy_data, one_process):
    processor = Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4)
    data = ConversationDataset(read_conversations(toy_data / "ucf101_train.jsonl", toy_data / "images"), processor)
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    sums = []  # of each example: loss summed over its supervised tokens, and their number
    with torch.no_grad():
        for example in data:
            batch = Collator(processor, "right")([example])
            labels = batch.pop("labels")[:, 1:]
            scores = model(**batch).logits[:, :-1].flatten(0, 1)
            summed = torch.nn.functional.cross_entropy(scores, labels.flatten(), reduction="sum")
            sums.append((summed.item(), (labels != -100).sum().item()))
    # The first step's four examples are the only four of the data with this mean.
    first = one_process[0][0]
    indices = range(len(sums))
    found = [
        (a, b, c, d)
        for a in indices
        for b in range(a)
        for c in range(b)
        for d in range(c)
        if abs(sum(sums[i][0] for i in (a, b, c, d)) / sum(sums[i][1] for i in (a, b, c, d)) - first) < 1e-6
    ]
    assert found


def test_micro_batches_of_four(toy_data, tmp_path, one_process):
    losses = in_process(toy_data, tmp_path, *SIX_STEPS, "--deepspeed", "none", "--batch_size_per_gpu", "4")
    assert_same_run(losses, tmp_path, one_process)


@pytest.mark.parametrize("config", ["zero2", "zero2_offload", "zero3"])
def test_two_ranks_under_deepspeed_are_one_training(config, toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--batch_size_per_gpu", "1", "--deepspeed", ROOT / "ds_config" / f"{config}.json"]
    flags += ["--per_device_eval_batch_size", "1"]  # ZeRO-3 waits for ever if text and images make ranks differ
    first, second = two_ranks(toy_data, tmp_path, *flags)
    assert first["losses"] == second["losses"] and first["engine"] == "DeepSpeedEngine"
    assert first == second or config == "zero3"  # where each rank keeps its own part of the weights
    assert_same_run(first["losses"], tmp_path / "out", one_process)


def test_two_ranks_without_deepspeed_are_one_training(toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--batch_size_per_gpu", "2", "--deepspeed", "none"]
    first, second = two_ranks(toy_data, tmp_path, *flags)
    assert first == second and first["engine"] == "DistributedDataParallel"
    assert_same_run(first["losses"], tmp_path / "out", one_process)


def test_two_ranks_with_micro_batches_filled_by_tokens_are_one_training(toy_data, tmp_path, one_process):
    flags = [*SIX_STEPS, "--max_tokens_per_gpu", "900", "--deepspeed", ROOT / "ds_config" / "zero2.json"]
    first, second = two_ranks(toy_data, tmp_path, *flags)
    assert first == second and first["engine"] == "DeepSpeedEngine"
    assert_same_run(first["losses"], tmp_path / "out", one_process)


def test_a_whole_run_with_frozen_vision_in_bf16(toy_data, tmp_path):
    flags = "--freeze_vision_model --bf16 --num_train_epochs 2 --batch_size 8 --batch_size_per_gpu 2".split()
    first, second = two_ranks(toy_data, tmp_path, *flags, "--learning_rate", "1e-2")
    assert first == second and len(first["losses"]) == 6
    out = tmp_path / "out"
    saved, base = load_file(out / "model.safetensors"), load_file(CHECKPOINT / "model.safetensors")
    assert saved.keys() == base.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16
        same = torch.equal(tensor, base[name].bfloat16())
        assert same == ("vision_embed_tokens" in name), name

    reports = [json.loads((out / f"eval_{when}.json").read_text()) for when in ("before", "after")]
    for report in reports:
        assert report["metric"] == "accuracy" and report["num_examples"] == len(report["predictions"]) == 6
        assert report["accuracy"] == sum(row["score"] for row in report["predictions"]) / 6
        assert [row["id"] for row in report["predictions"]] == [f"val-{i}" for i in range(6)]
    # What was saved is what was evaluated: it gives the reported answers again.
    model, processor = Phi3VForCausalLM.from_pretrained(out), Phi3VProcessor.from_pretrained(out)
    assert processor.image_processor.num_crops == 4
    conversations = read_conversations(toy_data / "ucf101_val.jsonl", toy_data / "images")
    data = ConversationDataset(conversations, processor, for_generation=True)
    answers = generate_answers(model, processor, data, 8, 8, compute_dtype=torch.bfloat16, disable_tqdm=True)
    assert answers == [row["prediction"] for row in reports[1]["predictions"]]


def test_text_alone(tmp_path):
    """No image anywhere: vision gets no gradient, and nothing waits for it."""
    (tmp_path / "images").mkdir()
    for split in ("train", "val"):
        turn = {"images": [], "user": "Is it?", "assistant": "yes"}
        lines = [json.dumps({"id": str(i), "conversations": [turn]}) for i in range(4)]
        (tmp_path / f"ucf101_{split}.jsonl").write_text("\n".join(lines))
    flags = ["--deepspeed", "none", "--batch_size", "2", "--num_train_epochs", "10", "--learning_rate", "3e-3"]
    losses = in_process(tmp_path, tmp_path / "out", *flags)
    assert losses[-1] < losses[0] / 2


WRONG = [
    ("--batch_size 0", "--batch_size is 0, must be at least 1"),
    ("--batch_size 6 --batch_size_per_gpu 4", "--batch_size 6 can't be shared out"),
    ("--batch_size x", "invalid int value: 'x'"),
    ("--num_crops 0", "--num_crops is 0, must be at least 1"),
    ("--num_crops 17", "at most 16"),
    ("--max_tokens_per_gpu 0", "--max_tokens_per_gpu must be auto, or a whole number of at least 1"),
    ("--max_tokens_per_gpu 9 --batch_size_per_gpu 2", "contradict each other"),
    ("--max_tokens_per_gpu 20", "--max_tokens_per_gpu 20 is less than"),
    ("--save_total_limit -1", "--save_total_limit is -1, must be at least 1"),
    ("--save_steps 0", "--save_steps is 0.0, must be above 0"),
    ("--save_only_model true", "--save_only_model is not taken here"),
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
    ("--learning_rate nan", "--learning_rate is nan, must be above 0"),
    ("--num_train_epochs 0", "--num_train_epochs is 0"),
    ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size is 0"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers is -1"),
    ("--seed -1", "--seed is -1"),
    ("--use_lora --train_separators --deepspeed ds_config/zero2.json", "can't run under DeepSpeed"),
    ("--learning_rate 0", "--learning_rate is 0.0, must be above 0"),
    ("--attn_implementation flex_attention", "is unknown"),
    ("--use_flash_attention --attn_implementation sdpa", "contradicts"),
    ("--gradient_accumulation_steps 2", "not taken here"),
    ("--per_device_train_batch_size 2", "use --batch_size_per_gpu"),
    ("--weight_decay 0.1", "use --wd"),
    ("--fsdp full_shard", "not taken here"),
    ("--push_to_hub", "not taken here"),
    ("--label_smoothing_factor=0.1", "not taken here"),
    ("--hub_model_id me/mine", "not taken here"),
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
        script.exit_on_input_error(lambda: script.main(argv))
    assert status.value.code == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list((tmp_path).glob("out/*"))


def test_a_model_that_lacks_something_is_refused(toy_data, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(CHECKPOINT, broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.vision_embed_tokens.img_projection.0.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})

    def fails(message):
        with pytest.raises(script.InputError, match=message):
            in_process(toy_data, tmp_path / "out", "--deepspeed", "none", "--model_name_or_path", str(broken))

    fails("lacks model.vision_embed_tokens.img_projection.0.weight")
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails("--model_name_or_path")
    (broken / "tokenizer.json").unlink()
    fails("--model_name_or_path")
    (broken / "config.json").write_text('{"model_type": "phi3"}')
    fails("holds a model of type phi3, must be phi3_v")


def test_an_output_folder_with_checkpoints_is_kept(toy_data, tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(script.InputError, match="holds checkpoints: resume with"):
        in_process(toy_data, tmp_path)


def test_rank_0_alone_reports_and_torchrun_ends(toy_data, tmp_path):
    flags = ["--data_dir", toy_data, "--output_dir", tmp_path, *COMMON, "--batch_size", "3"]
    run = torchrun(ROOT / "finetune_hf_trainer_ucf101.py", *flags)
    assert run.returncode == 1  # torchrun's own status
    assert run.stderr.count("error: --batch_size 3 can't be shared out: 2 processes") == 1
    assert "exitcode  : 2" in run.stderr
