"""Prompts are tokenized as by the official processor, and anything else raises a ValueError."""

import json
import os

import golden_inputs
import numpy as np
import pytest
import torch
import transformers
from bad_inputs import RANDOM_IMAGES, RANDOM_TEXTS
from helpers import CHECKPOINT, GOLDEN, fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from phi3v import Phi3VForCausalLM, Phi3VProcessor
from phi3v.model.processing_phi3v import changed_settings

OFFICIAL = json.loads((GOLDEN / "processor.json").read_text())
# The real tokenizer is not part of the repository; its checks run where PHI3V_SNAPSHOT names a copy.
SNAPSHOT = os.environ.get("PHI3V_SNAPSHOT")

if SNAPSHOT:

    @pytest.mark.parametrize("name", OFFICIAL["prompts"])
    def test_ids_of_prompts(name, tmp_path):
        case = OFFICIAL["prompts"][name]
        processor = Phi3VProcessor.from_pretrained(SNAPSHOT, num_crops=case["num_crops"])
        processor.save_pretrained(tmp_path)
        images = [golden_inputs.pil_image(*size) for size in case["images"]]
        expected = [i for i, n in case["input_ids_rle"] for _ in range(n)]
        for p in (processor, Phi3VProcessor.from_pretrained(tmp_path)):
            assert p(case["prompt"], images, return_tensors="pt")["input_ids"][0].tolist() == expected

    @pytest.mark.parametrize("prompt", ["no tag", "<|image_2|>", "<|image_0|>", "<|image_1|><|image_2|>"])
    def test_tags_that_do_not_match(prompt):
        with pytest.raises(ValueError, match="image tags do not match the 1 images"):
            Phi3VProcessor.from_pretrained(SNAPSHOT)(prompt, Image.new("RGB", (20, 20)))


@fuzz(150)
@given(st.lists(RANDOM_IMAGES, max_size=2), RANDOM_TEXTS)
def test_random_prompts(processor, images, text):
    """Whatever a caller gives the processor, it returns a batch or raises the ValueError that it documents."""
    try:
        batch = processor(text, images, return_tensors="pt")
    except ValueError:
        return
    assert batch["input_ids"].shape[0] == 1 and ("pixel_values" in batch) == bool(images)


PROMPTS = [
    f"<|user|>\n{text}<|end|>\n<|assistant|>\n"
    for text in ("<|image_1|>\nWhat digit is this?", "Why?", "<|image_1|><|image_2|>\nWhich one of these is larger?")
]


@pytest.fixture(scope="module")
def model():
    return Phi3VForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pictures():
    return [Image.effect_noise(size, 90).convert("RGB") for size in ((90, 40), (40, 60), (56, 56))]


@pytest.fixture(scope="module")
def images(pictures):
    """Those of each of the PROMPTS."""
    return [pictures[:1], None, pictures[1:]]


def answers(model, processor, prompts, images, **how) -> list[str]:
    batch = processor(prompts, images, **how)
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id)
    return processor.batch_decode(ids[:, batch["input_ids"].shape[1] :])


def test_several_prompts_get_the_answers_that_each_gets_alone(model, processor, images):
    alone = [answers(model, processor, prompt, own)[0] for prompt, own in zip(PROMPTS, images, strict=True)]
    pad, end = processor.tokenizer.pad_token, "<|end|>"
    together = answers(model, processor, PROMPTS, images)
    assert [text.replace(pad, "").split(end)[0] for text in together] == [text.split(end)[0] for text in alone]
    loaded = transformers.AutoProcessor.from_pretrained(CHECKPOINT)
    assert answers(model, loaded, PROMPTS, images) == together
    assert answers(model, processor, PROMPTS, images, padding_side="left") == together


def test_the_side_of_padding_can_be_chosen(tmp_path):
    def starts(processor, **how):
        return processor(PROMPTS[:2], [Image.new("RGB", (9, 9)), None], **how)["attention_mask"][1, 0].item()

    processor = Phi3VProcessor.from_pretrained(CHECKPOINT)
    assert (starts(processor), starts(processor, padding_side="right"), starts(processor, padding_side="left")) == (
        0,
        1,
        0,
    )
    assert starts(Phi3VProcessor.from_pretrained(CHECKPOINT, padding_side="right")) == 1
    processor.tokenizer.padding_side = "right"
    assert starts(processor) == 1
    assert starts(Phi3VProcessor(processor.image_processor, processor.tokenizer)) == 0
    with pytest.raises(ValueError, match="padding_side is 'top'"):
        starts(processor, padding_side="top")


def test_saved_files_are_as_they_were(tmp_path):
    Phi3VProcessor.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"preprocessor_config.json", "tokenizer_config.json"}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (CHECKPOINT / path.name).read_bytes()


def test_whole_outputs_are_decoded(model, processor, images):
    batch = processor(PROMPTS[2], images[2])
    ids = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert (ids < 0).any()
    (text,) = processor.batch_decode(ids)
    assert text.count("<|image_1|>") == text.count("<|image_2|>") == 1
    assert text.index("<|user|>") < text.index("<|image_1|>") < text.index("<|image_2|>") < text.index("larger?")
    answer = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :])
    assert text.endswith(answer) and answer
    assert processor.decode(ids[0]) == processor.decode(ids.tolist()[0]) == processor.decode(ids.numpy()[0]) == text
    assert (
        processor.decode(ids) == processor.batch_decode([ids[0]]) == processor.batch_decode(np.asarray(ids)) == [text]
    )
    (without,) = processor.batch_decode(ids, skip_special_tokens=True)
    assert "<|" not in without and "larger?" in without
    assert processor.post_process_image_text_to_text(ids) == [without]
    new = ids[:, batch["input_ids"].shape[1] :]
    assert processor.batch_decode(new) == processor.tokenizer.batch_decode(new)
    assert processor.batch_decode([]) == [] and processor.decode(5) == processor.tokenizer.decode(5)


@pytest.fixture(scope="module", params=["by its folder", "by its parts"])
def pipe(request, model):
    if request.param == "by its folder":
        return transformers.pipeline("image-text-to-text", model=str(CHECKPOINT))
    return transformers.pipeline(
        "image-text-to-text", model=model, processor=Phi3VProcessor.from_pretrained(CHECKPOINT)
    )


def test_a_pipeline_asks_nothing(monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    transformers.pipeline("image-text-to-text", model=str(CHECKPOINT))
    assert not asked


def how():
    """A dict of its own for each call, because the pipelines of transformers 5.23 change it."""
    return {"max_new_tokens": 8, "generate_kwargs": {"do_sample": False}, "return_full_text": False}


def test_a_pipeline_takes_prompts(pipe, model, processor, images):
    for prompt, own in zip(PROMPTS, images, strict=True):
        (answer,) = answers(model, processor, prompt, own)
        (result,) = pipe(own, text=prompt, **how()) if own else pipe(text=prompt, **how())
        assert result["generated_text"].strip() == answer.split("<|end|>")[0].strip() != ""
    several = pipe([images[0], images[2]], text=[PROMPTS[0], PROMPTS[2]], **how())
    wanted = [answers(model, processor, PROMPTS[i], images[i])[0].split("<|end|>")[0].strip() for i in (0, 2)]
    assert [result["generated_text"].strip() for result in several] == wanted
    assert pipe(images[0], text=PROMPTS[0], max_new_tokens=8)[0]["generated_text"].startswith(PROMPTS[0])


def messages(images, text):
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_takes_chats(batch_size, pipe, model, processor, pictures, tmp_path):
    pictures[1].save(tmp_path / "a.png")
    chats = [
        messages(pictures[:1], "What digit is this?"),
        messages([str(tmp_path / "a.png")], "Is this the one I meant?"),
    ]
    prompts = [f"<|user|>\n<|image_1|>\n{chat[0]['content'][1]['text']}<|end|>\n<|assistant|>\n" for chat in chats]
    wanted = [
        answers(model, processor, p, i)[0].split("<|end|>")[0] for p, i in zip(prompts, pictures[:2], strict=True)
    ]
    found = pipe(text=chats, batch_size=batch_size, **how())
    assert [result[0]["generated_text"].strip() for result in found] == [text.strip() for text in wanted]
    assert pipe(text=chats[0], **how())[0]["generated_text"].strip() == wanted[0].strip()
    (full,) = pipe(text=chats[0], max_new_tokens=8)
    assert full["generated_text"][-1]["role"] == "assistant" and full["generated_text"][:-1] == chats[0]


def test_a_chat_can_be_continued(processor):
    chat = [*messages([], "What?"), {"role": "assistant", "content": [{"type": "text", "text": "This is"}]}]
    assert processor.apply_chat_template(chat, continue_final_message=True).endswith("<|assistant|>\nThis is")


def test_images_beside_the_messages(processor, pictures):
    places = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    beside = processor.apply_chat_template(places, processor_kwargs={"images": pictures[:1]}, **how)
    inside = processor.apply_chat_template(messages(pictures[:1], "What?"), **how)
    assert all(torch.equal(beside[key], inside[key]) for key in ("input_ids", "pixel_values", "image_sizes"))
    del how["return_dict"]
    assert torch.equal(processor.apply_chat_template(messages(pictures[:1], "What?"), **how), inside["input_ids"])
    both = processor.apply_chat_template([messages([], "a"), messages([], "b c")], padding_side="right", **how)
    assert both[0, 0] == both[1, 0] == processor.tokenizer.bos_token_id
    with pytest.raises(ValueError, match="image tags do not match"):
        processor.apply_chat_template(places, **how)


@pytest.mark.parametrize("medium", ["videos", "audio"])
def test_there_is_no_other_medium(medium, processor):
    assert processor("a", **{medium: None})["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="takes no video and no audio"):
        processor("a", **{medium: ["a.mp4"]})


def test_other_settings_than_the_saved_ones_are_one_warning(tmp_path):
    Phi3VProcessor.from_pretrained(CHECKPOINT, num_crops=4).save_pretrained(tmp_path)
    assert changed_settings(tmp_path, None, None) == changed_settings(tmp_path, 4, False) == []
    then, now = "--num_crops 4 --exif_rotate False", "--num_crops 16 --exif_rotate True"
    said = f"warning: {tmp_path} was saved with {then} and is asked with {now}, which can cost accuracy"
    assert changed_settings(tmp_path, 16, True) == [said]
    assert "--num_crops 4 and is asked with --num_crops 1," in changed_settings(tmp_path, 1, None)[0]
