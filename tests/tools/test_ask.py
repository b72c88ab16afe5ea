"""A model that is asked from the terminal answers like generate, and remembers the conversation."""

import io
import json
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import CHECKPOINT, ROOT
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model import processing_phi3v
from phi3v.model.adapters import add_adapter
from phi3v.model.vision_parts import SEPARATORS, SEPARATORS_FILE
from tools import ask
from tools import merge_adapter as merge_tool

QUESTION = "What digit is this?"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name, size, grey in (("a.png", (40, 60), 250), ("b.png", (90, 40), 10)):
        Image.effect_noise(size, grey).convert("RGB").save(folder / name)
    return [str(folder / "a.png"), str(folder / "b.png")]


@pytest.fixture(scope="module")
def processor():
    return Phi3VProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter with weights so large that its answers differ from those of the base."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    base = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    model = add_adapter(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=r"lm_head|model\.layers.*_proj"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def expected(model, processor, prompt, images, n):
    """The greedy answer, computed only with the public processor and transformers' generate."""
    batch = processor(prompt, [Image.open(path) for path in images] or None)
    ids = model.generate(**batch, do_sample=False, max_new_tokens=n, pad_token_id=processor.tokenizer.pad_token_id)
    return processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def asked(capsys, *arguments):
    ask.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_answer_is_that_of_generate(number, images, processor, capsys):
    tags = "".join(f"<|image_{k + 1}|>" for k in range(number)) + ("\n" if number else "")
    prompt = f"<|user|>\n{tags}{QUESTION}<|end|>\n<|assistant|>\n"
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    wanted = expected(model, processor, prompt, images[:number], 20)
    assert wanted and asked(capsys, CHECKPOINT, *images[:number], "--question", QUESTION) == wanted + "\n"
    # Flags may stand before the images.
    assert asked(capsys, CHECKPOINT, "--question", QUESTION, *images[:number]) == wanted + "\n"


def test_images_inside_of_a_question_and_a_text_of_the_system(images, processor, capsys):
    model = Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)

    def wanted(content, system=""):
        prompt = f"{system}<|user|>\n{content}<|end|>\n<|assistant|>\n"
        return expected(model, processor, prompt, images, 20) + "\n"

    ask_both = [CHECKPOINT, *images, "--max_new_tokens", 20, "--question"]
    inside = "Is <|image_1|> larger than <|image_2|>?"
    assert asked(capsys, *ask_both, "Is <image> larger than <image>?") == wanted(inside)
    found = asked(capsys, *ask_both, "Is <image> larger than <image>?", "--system", "Be brief.")
    assert found == wanted(inside, "<|system|>\nBe brief.<|end|>\n")
    assert asked(capsys, *ask_both, "<image> <image>\nWhich?") == wanted("<|image_1|><|image_2|>\nWhich?")
    literal = asked(capsys, *ask_both, "What is <image>?", "--literal_tags")
    assert literal == wanted("<|image_1|><|image_2|>\nWhat is <image>?")
    for question, message in (
        ("Is <image> red?", "--question is 'Is <image> red[?]', with 1 of the places <image> for 2 images"),
        ("<image><image>", "--question is '<image><image>', which holds no text beside its places"),
    ):
        with pytest.raises(ask.InputError, match=message):
            ask.parse_arguments(list(map(str, [*ask_both, question])))
    with pytest.raises(ask.InputError, match=r"--system holds '<\|end\|>'"):
        ask.parse_arguments([str(CHECKPOINT), "--system", "a<|end|>"])
    ask.parse_arguments([str(CHECKPOINT), "--question", "What does <image> mean?"])  # without images it is text


def test_a_follow_up_keeps_the_conversation(images, monkeypatch, capsys):
    conversations = []
    encode = ask.encode
    monkeypatch.setattr(ask, "encode", lambda p, turns: conversations.append(json.dumps(turns)) or encode(p, turns))
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\nAnd why?\n\nnot asked\n"))
    first, second = asked(capsys, CHECKPOINT, images[0], "--max_new_tokens", 5).splitlines()
    assert [json.loads(turns) for turns in conversations[1:]] == [
        [{"images": [images[0]], "user": QUESTION, "assistant": ""}],
        [
            {"images": [images[0]], "user": QUESTION, "assistant": first.strip()},
            {"images": [], "user": "And why?", "assistant": ""},
        ],
    ]
    alone = asked(capsys, CHECKPOINT, images[0], "--max_new_tokens", 5, "--question", QUESTION)
    assert first == alone.strip() and second


def test_an_answer_is_shown_while_it_is_generated(images, monkeypatch):
    shown = []
    monkeypatch.setattr(ask.TextStreamer, "on_finalized_text", lambda self, text, **_: shown.append(text))
    turns = [{"images": images, "user": QUESTION, "assistant": ""}]
    processor, model = ask.load(ask.parse_arguments([str(CHECKPOINT)]))
    model.generation_config.eos_token_id = None
    monkeypatch.setattr(processing_phi3v, "END_TOKENS", ("<|user|>",))
    answer = ask.answer(model, processor, turns, 12)
    assert len(shown) > 2 and "".join(shown).strip() == answer


def test_an_adapter_answers_as_its_merged_model_does(adapter, images, tmp_path, capsys):
    Phi3VProcessor.from_pretrained(CHECKPOINT).save_pretrained(adapter)
    merge_tool.main([str(adapter), str(tmp_path), "--dtype", "fp32"])
    question = [images[0], "--question", QUESTION, "--max_new_tokens", 12]
    capsys.readouterr()
    from_adapter = asked(capsys, adapter, *question)
    assert from_adapter == asked(capsys, tmp_path, *question) != asked(capsys, CHECKPOINT, *question)


def test_base_separators_and_processor_of_an_adapter(adapter, tmp_path, monkeypatch):
    """--base stands in for a lost base; separators are the adapter's; the processor is the base's if it has none."""
    for path in adapter.glob("adapter_*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone/away"}))
    name = SEPARATORS[0]
    weights = load_file(CHECKPOINT / "model.safetensors")
    trained = {separator: weights[separator].float() + 1 for separator in SEPARATORS}
    save_file(trained, tmp_path / SEPARATORS_FILE)
    monkeypatch.setattr("phi3v.hub.OFFLINE_ASKED_FOR", True)
    with pytest.raises(ask.InputError, match="gone/away is not, .* in the cache .*give --base"):
        ask.load(ask.parse_arguments([str(tmp_path)]))
    processor, model = ask.load(ask.parse_arguments([str(tmp_path), "--base", str(CHECKPOINT), "--num_crops", "3"]))
    torch.testing.assert_close(model.get_base_model().get_parameter(name).data, trained[name])
    assert processor.image_processor.num_crops == 3


def test_four_bits_leave_out_head_and_vision(adapter, capsys, monkeypatch):
    arguments = [str(adapter), "--load_in_4bit", "--question", QUESTION, "--max_new_tokens", "3"]
    _, model = ask.load(ask.parse_arguments(arguments))
    kinds = {name: type(module).__name__ for name, module in model.get_base_model().named_modules()}
    four = {name for name, kind in kinds.items() if kind == "Linear4bit"}
    assert any("qkv_proj" in name for name in four)
    assert not any("lm_head" in name or "vision" in name for name in four)
    assert asked(capsys, *arguments).strip()


def test_precision_by_default_and_on_request(monkeypatch):
    assert ask.parse_arguments([str(CHECKPOINT)]).dtype == "fp32"
    assert ask.load(ask.parse_arguments([str(CHECKPOINT), "--dtype", "bf16"]))[1].dtype == torch.bfloat16
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert ask.parse_arguments([str(CHECKPOINT)]).dtype == "bf16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: [])
    assert ask.parse_arguments([str(CHECKPOINT)]).dtype == "fp16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "folder"),
        (["CHECKPOINT", "--question", " "], "--question is ' ', must be a text"),
        (["CHECKPOINT", "--question", "see <|image_1|>"], "--question holds '<|image_1|>'"),
        (["CHECKPOINT", "--colour"], "unrecognized arguments: --colour"),
        (["CHECKPOINT", "--max_new_tokens", "0"], "--max_new_tokens 0: must be at least 1"),
        (["CHECKPOINT", "--num_crops", "0"], "--num_crops 0"),
        (["CHECKPOINT", "--max_new_tokens", "5000", "--question", "a"], "more than the model's 4096"),
        (["CHECKPOINT", "--dtype", "fp16"], "--dtype fp16 needs a GPU: on a CPU use --dtype bf16"),
        (["CHECKPOINT", "--attn_implementation", "flash_attention_2"], "flash attention needs an Ampere GPU"),
        (["CHECKPOINT", "--base", "x"], "--base x is only for an adapter"),
        (["CHECKPOINT", "nowhere.png", "--question", "a"], "nowhere.png can't be read as an image"),
        (["CHECKPOINT", "Makefile", "--question", "a"], "Makefile can't be read as an image (in none of the formats"),
        (["README.md", "CHECKPOINT"], "README.md is not a folder: give the model's folder first"),
        (["nowhere"], "nowhere is not a folder"),
        (["demo"], "demo holds no model: it has neither config.json nor adapter_config.json"),
        (
            ["CHECKPOINT", "none.jpg", "--question", "a"],
            "none.jpg can't be read as an image (the file does not exist)",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ask.InputError) as error:
        ask.main([str(CHECKPOINT) if argument == "CHECKPOINT" else argument for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_that_lacks_weights(adapter, tmp_path):
    base, merged = tmp_path / "base", tmp_path / "merged"
    base.mkdir()
    for path in CHECKPOINT.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ask.InputError, match="lacks the weights lm_head.weight"):
        ask.main([str(base)])
    with pytest.raises(ask.InputError, match="lacks the weights lm_head.weight"):
        merge_tool.main([str(adapter), str(merged), "--base", str(base)])
    assert not merged.exists()


@pytest.mark.slow
def test_from_the_terminal(images):
    """Only the answer of the model on standard output."""
    command = [sys.executable, ROOT / "tools" / "ask.py", CHECKPOINT]
    good = subprocess.run([*command, images[0]], input=f"{QUESTION}\n", capture_output=True, text=True)
    assert good.returncode == 0 and len(good.stdout.splitlines()) == 1, good.stderr


def test_an_error_is_one_line_and_status_2(monkeypatch, capfd):
    monkeypatch.setattr("sys.argv", ["ask.py", str(CHECKPOINT), "nowhere.png"])
    with pytest.raises(SystemExit) as status:
        runpy.run_path(str(ROOT / "tools" / "ask.py"), run_name="__main__")
    output, error = capfd.readouterr()
    assert status.value.code == 2 and output == ""
    assert error.splitlines()[-1].startswith("error: nowhere.png can't be read") and "Traceback" not in error


def test_an_answer_can_not_command_the_terminal(capsys):
    ask.Streamer(None).on_finalized_text("é 👍🏽\t\x1b]0;PWNED\x07\n")
    assert capsys.readouterr().out == "é 👍🏽\t\\x1b]0;PWNED\\x07\n"
