"""Texts have the known chat format whatever a folder's template says, and saved tokenizers are read by old readers."""

import json
import shutil

import pytest
from bad_models import edit
from helpers import CHECKPOINT

from phi3v import Phi3VProcessor
from phi3v.data.conversations import chat_text
from phi3v.model.chat import CHAT_TEMPLATE, SAME_CHAT_TEMPLATE, render
from phi3v.model.tokenizer import write_merges_as_texts
from tools import ask

LOOPS = "{% for a in range(100000) %}{% for b in range(100000) %}{% for c in range(9) %}" + "{% endfor %}" * 3
TEMPLATES = [LOOPS, "hello", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{% for", [{"name": "a", "template": LOOPS}]]
# The kinds of parts that tokenizers 0.19 reads.
KNOWN_IN_0_19 = {"BPE", "Sequence", "Prepend", "Replace", "TemplateProcessing", "ByteFallback", "Fuse", "Strip"}
TURNS = [{"images": [], "user": "a", "assistant": "b"}, {"images": [], "user": "c", "assistant": ""}]


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("template", TEMPLATES, ids=[str(template)[:20] for template in TEMPLATES])
def test_a_strangers_template_is_not_run_and_said_so(template, copy, capfd):
    edit("tokenizer_config.json", chat_template=template)(copy)
    processor = Phi3VProcessor.from_pretrained(copy)
    (line,) = capfd.readouterr().err.splitlines()
    assert "its chat template is not that of Phi-3.5-vision, and not used" in line and line.isprintable()
    text, _ = chat_text(processor, TURNS, for_generation=True)
    assert text == "<|user|>\na<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n"
    assert processor.apply_chat_template([{"role": "user", "content": "a"}]) == "<|user|>\na<|end|>\n"
    assert processor.chat_template == processor.tokenizer.chat_template == CHAT_TEMPLATE


def test_a_template_in_a_file_of_its_own(copy, capfd):
    (copy / "chat_template.jinja").write_text(LOOPS)
    ask.main([str(copy), "--question", "What?", "--max_new_tokens", "2"])
    told = capfd.readouterr()
    assert "its chat template is not" in told.err and len(told.out.splitlines()) == 1


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, SAME_CHAT_TEMPLATE])
def test_the_format_is_what_the_known_templates_render(template, copy, capfd):
    edit("tokenizer_config.json", chat_template=template)(copy)
    tokenizer = Phi3VProcessor.from_pretrained(copy).tokenizer
    assert capfd.readouterr().err == ""
    messages = [{"role": role, "content": f"{role}\n x "} for role in ("system", "user", "assistant", "user")]
    for n in (1, 2, 3, 4):
        for prompt in (False, True):
            wanted = tokenizer.apply_chat_template(messages[:n], tokenize=False, add_generation_prompt=prompt)
            assert render(messages[:n], prompt) == wanted


def test_a_tokenizer_without_a_padding_token(copy):
    edit("tokenizer_config.json", pad_token=None, eos_token=None)(copy)
    assert Phi3VProcessor.from_pretrained(copy).tokenizer.pad_token == "<|endoftext|>"


def test_a_saved_tokenizer_has_the_form_that_old_readers_know(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = saved["model"]["merges"]
    assert len(merges) > 100 and all(isinstance(merge, str) and merge.count(" ") == 1 for merge in merges)
    parts = [saved["model"], *(saved[name] for name in ("normalizer", "post_processor", "decoder"))]
    parts += [inner for part in parts for inner in part.get("normalizers", []) + part.get("decoders", [])]
    assert {part["type"] for part in parts} <= KNOWN_IN_0_19
    again = Phi3VProcessor.from_pretrained(tmp_path).tokenizer
    texts = ["Zoë  日本", "<|user|>\nWhat digit is this?<|end|>\n", "SlideUp 42"]
    assert again(texts).input_ids == processor.tokenizer(texts).input_ids


@pytest.mark.parametrize(
    ("merges", "wanted"),
    [([["a", "b"], ["ab", "c"]], ["a b", "ab c"]), ([["a", "b"], ["a b", "c"]], None), (["a b"], None), ([], None)],
)
def test_merges_of_tokens_with_spaces_stay_lists(merges, wanted, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"merges": merges}}))
    write_merges_as_texts(path)
    assert json.loads(path.read_text())["model"]["merges"] == (wanted or merges)
