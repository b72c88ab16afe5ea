"""Small repositories with the Hub's real names, layouts and schemas, for tests/loopback_hub.py to serve.

    python tests/hub_repositories.py ROOT

The models have the weights of the demo's base checkpoint; the data are random pictures with short texts.
"""

import hashlib
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from helpers import CHECKPOINT, ROOT, png_cell, texts_cell
from PIL import Image
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(ROOT / "demo"))
import make_data  # noqa: E402

MODEL, OLDER_MODEL = "microsoft/Phi-3.5-vision-instruct", "microsoft/Phi-3-vision-128k-instruct"
MINI, CAULDRON, VIDEOS = "nielsr/docvqa_1200_examples", "HuggingFaceM4/the_cauldron", "sayakpaul/ucf101-subset"
# For each configuration of the_cauldron its number of files and of rows. The Hub has 50 configurations; the ones that
# no script reads are represented by two. The files of the others are as many as there.
CONFIGURATIONS = {
    "clevr": (1, 2),
    "docvqa": (14, 28),
    "hateful_memes": (7, 520),
    "nlvr2": (17, 520),
    "websight": (2, 2),
}
MINI_ROWS = {"train": (48, "f795527aa19f0f90"), "test": (16, "41a63b2e1b4ecc5e")}
CLASSES = ("BabyCrawling", "BasketballDunk")

# The types of the columns, as `datasets` wrote them in 2022 and 2024.
IMAGE = {"decode": True, "id": None, "_type": "Image"}
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = {"dtype": "string", "id": None, "_type": "Value"}
LANGUAGES = ("de", "en", "es", "fr", "it")


def sequence(feature, length: int = -1) -> dict:
    return {"feature": feature, "length": length, "id": None, "_type": "Sequence"}


def number(dtype: str) -> dict:
    return {"dtype": dtype, "id": None, "_type": "Value"}


CAULDRON_FEATURES = {"images": sequence(IMAGE), "texts": [{"user": TEXT, "assistant": TEXT, "source": TEXT}]}
CAULDRON_SCHEMA = pa.schema(
    [
        ("images", pa.list_(IMAGE_TYPE)),
        ("texts", pa.list_(pa.struct([(key, pa.string()) for key in ("user", "assistant", "source")]))),
    ]
)
MINI_FEATURES = {
    "id": TEXT,
    "image": IMAGE,
    "query": dict.fromkeys(LANGUAGES, TEXT),
    "answers": sequence(TEXT),
    "words": sequence(TEXT),
    "bounding_boxes": sequence(sequence(number("float32"), 4)),
    "answer": {
        "match_score": number("float64"),
        "matched_text": TEXT,
        "start": number("int64"),
        "text": TEXT,
    },
}
MINI_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", IMAGE_TYPE),
        ("query", pa.struct([(language, pa.string()) for language in LANGUAGES])),
        ("answers", pa.list_(pa.string())),
        ("words", pa.list_(pa.string())),
        ("bounding_boxes", pa.list_(pa.list_(pa.float32(), 4))),
        (
            "answer",
            pa.struct(
                [
                    ("match_score", pa.float64()),
                    ("matched_text", pa.string()),
                    ("start", pa.int64()),
                    ("text", pa.string()),
                ]
            ),
        ),
    ]
)


def write_parquet(path: Path, rows: list[dict], schema: pa.Schema, features: dict):
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.with_metadata(about)), path, row_group_size=100)


def cauldron_row(config: str, i: int) -> dict:
    images, answers = [png_cell(i)], ("yes", "no")
    if config == "nlvr2":
        images, answers = [png_cell(2 * i + 5000), png_cell(2 * i + 5001)], ("True", "False")
    texts = [texts_cell(f"{config}, question {i}.{k}?", answers[(i + k) % 2]) for k in range(1 + i % 3)]
    return {"images": images, "texts": texts[: 1 if config == "hateful_memes" else 3]}


def write_cauldron(folder: Path):
    sizes = {}
    for config, (n_files, n_rows) in CONFIGURATIONS.items():
        rows = [cauldron_row(config, i) for i in range(n_rows)]
        sizes[config] = 0
        for k in range(n_files):
            unique = hashlib.sha1(f"{config}{k}".encode()).hexdigest()[:16]
            path = folder / config / f"train-{k:05}-of-{n_files:05}-{unique}.parquet"
            part = rows[k * n_rows // n_files : (k + 1) * n_rows // n_files]
            write_parquet(path, part, CAULDRON_SCHEMA, CAULDRON_FEATURES)
            sizes[config] += path.stat().st_size
    card = ["---", "size_categories:", "- 1M<n<10M", "dataset_info:"]
    for config, size in sizes.items():
        card += [f"- config_name: {config}", "  features:", "  - name: images", "    sequence: image"]
        card += ["  - name: texts", "    list:"]
        card += [f"    - name: {key}\n      dtype: string" for key in ("user", "assistant", "source")]
        card += ["  splits:", "  - name: train", f"    num_bytes: {size}.5701048"]
        card += [f"    num_examples: {CONFIGURATIONS[config][1]}", f"  download_size: {size}"]
        card += [f"  dataset_size: {size}.5701048"]
    card += ["configs:"]
    for config in sizes:
        card += [f"- config_name: {config}", "  data_files:", "  - split: train", f"    path: {config}/train-*"]
    (folder / "README.md").write_text("\n".join([*card, "---", "# Dataset Card for The Cauldron", ""]))
    (folder / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")


def write_mini(folder: Path):
    """With a dataset_infos.json and no README, as the repository has it since 2022."""
    splits, seed = {}, 9000
    for split, (n_rows, unique) in MINI_ROWS.items():
        rows = []
        for i in range(n_rows):
            seed += 1
            row = {"id": f"{split}_{i}", "image": png_cell(seed), "answers": [f"Answer {seed}", str(seed)]}
            row |= {"query": {language: f"{language} question {seed}?" for language in LANGUAGES}}
            row |= {"words": ["Answer", str(seed)], "bounding_boxes": [[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5]]}
            row |= {"answer": {"match_score": 1.0, "matched_text": "answer", "start": i, "text": "Answer"}}
            rows.append(row)
        path = folder / "data" / f"{split}-00000-of-00001-{unique}.parquet"
        write_parquet(path, rows, MINI_SCHEMA, MINI_FEATURES)
        splits[split] = {"name": split, "num_bytes": float(path.stat().st_size), "num_examples": n_rows}
        splits[split]["dataset_name"] = folder.name
    empty = ("post_processed", "supervised_keys", "task_templates", "builder_name", "config_name", "version")
    empty += ("download_checksums", "post_processing_size")
    info = {"description": "", "citation": "", "homepage": "", "license": "", "features": MINI_FEATURES}
    info |= dict.fromkeys(empty) | {"splits": splits, "download_size": 1, "dataset_size": 2, "size_in_bytes": 3}
    (folder / "dataset_infos.json").write_text(json.dumps({"nielsr--docvqa_1200_examples": info}))
    (folder / ".gitattributes").write_text("*.parquet filter=lfs diff=lfs merge=lfs -text\n")


def write_videos(folder: Path):
    folder.mkdir(parents=True)
    with tarfile.open(folder / "UCF101_subset.tar.gz", "w:gz") as tar:
        for split, n_videos in (("train", 4), ("val", 2), ("test", 2)):
            for label, name in enumerate(CLASSES):
                for k in range(n_videos):
                    noise = np.random.default_rng([label, k, len(split)]).integers(0, 256, (12, 24, 32), dtype=np.uint8)
                    frames = [Image.fromarray(pixels).resize((320, 240)) for pixels in noise]
                    content = make_data.encode_avi(frames)
                    member = tarfile.TarInfo(f"UCF101_subset/{split}/{name}/v_{name}_g{k + 1:02}_c01.avi")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    for name in CLASSES:
        (folder / f"v_{name}_g19_c02.avi").write_bytes(b"RIFF" + bytes(1000))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / ".gitattributes").write_text("")


def write_model(folder: Path, older: bool = False):
    """The demo's weights in two files, with the other files that the repositories of the real models have.

    older: as Phi-3-vision-128k-instruct, with 16 crops and positions scaled for a context of 131,072 tokens.
    """
    folder.mkdir(parents=True)

    def write(name: str, content: dict):
        (folder / name).write_text(json.dumps(content, indent=2))

    def read(name: str) -> dict:
        return json.loads((CHECKPOINT / name).read_text())

    tensors = load_file(CHECKPOINT / "model.safetensors")
    names, weight_map = list(tensors), {}
    for k, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{k:05}-of-00002.safetensors"
        save_file({name: tensors[name].clone() for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})

    code = {"config": "configuration_phi3_v", "model": "modeling_phi3_v", "processor": "processing_phi3_v"}
    code["image"] = "image_processing_phi3_v" if older else code["processor"]
    processor_map = {"AutoProcessor": f"{code['processor']}.Phi3VProcessor"}
    config = read("config.json")
    config |= {"_name_or_path": folder.name, "_attn_implementation": "flash_attention_2"}
    config["auto_map"] = {"AutoConfig": f"{code['config']}.Phi3VConfig"}
    config["auto_map"]["AutoModelForCausalLM"] = f"{code['model']}.Phi3VForCausalLM"
    if older:
        half = config["hidden_size"] // config["num_attention_heads"] // 2
        factors = {"short_factor": [1.0] * half, "long_factor": [1.0 + i / 4 for i in range(half)]}
        config |= {"rope_scaling": factors | {"type": "su"}, "max_position_embeddings": 131072}
    write("config.json", config | {"transformers_version": "4.38.1"})
    generation = read("generation_config.json")
    write("generation_config.json", generation | {"_from_model_config": True, "transformers_version": "4.38.1"})
    crops = {"num_crops": 16 if older else 4}
    image_map = {"AutoImageProcessor": f"{code['image']}.Phi3VImageProcessor"}
    write(
        "preprocessor_config.json", read("preprocessor_config.json") | crops | {"auto_map": image_map | processor_map}
    )
    if not older:
        write("processor_config.json", {"auto_map": processor_map, "processor_class": "Phi3VProcessor"})
    tokenizer = {"auto_map": processor_map, "tokenizer_class": "LlamaTokenizer", "legacy": False}
    tokenizer |= {"sp_model_kwargs": {}, "use_default_system_prompt": False, "add_bos_token": True}
    special = {"additional_special_tokens": ["<|system|>", "<|end|>", "<|user|>", "<|end|>"]}
    write("tokenizer_config.json", read("tokenizer_config.json") | tokenizer | special | {"add_eos_token": False})
    shutil.copy(CHECKPOINT / "tokenizer.json", folder)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    tokens = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    tokens = {name: {"content": token} | plain for name, token in tokens.items()}
    write("special_tokens_map.json", special | tokens)
    for name in {*code.values(), "sample_inference"}:
        (folder / f"{name}.py").write_text('raise RuntimeError("code of the repository was executed")\n')
    for name in ("LICENSE", "README.md", "SECURITY.md", "SUPPORT.md", "CODE_OF_CONDUCT.md", ".gitattributes"):
        (folder / name).write_text(f"{name}\n")


def write_repositories(root: Path):
    write_cauldron(root / "datasets" / CAULDRON)
    write_mini(root / "datasets" / MINI)
    write_videos(root / "datasets" / VIDEOS)
    write_model(root / "models" / MODEL)
    write_model(root / "models" / OLDER_MODEL, older=True)


if __name__ == "__main__":
    write_repositories(Path(sys.argv[1]))
