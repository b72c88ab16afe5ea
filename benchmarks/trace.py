"""What a training step of the real model would cost a GPU, counted without one, and a predicted time.

    python benchmarks/trace.py                                       # 4 pages of 4x4 crops in a micro-batch
    python benchmarks/trace.py --task images --micro_batch 1         # small images of 1x2 crops, one at a time
    python benchmarks/trace.py --recompute everything --by part      # what each part of the model costs
    python benchmarks/trace.py --table                               # the table in docs/performance.md

One micro-batch goes forward and backward through Phi-3.5-vision on meta tensors, which have sizes and no values. This
counts kernel launches, FLOPs, and the bytes that memory-bound kernels read and write; tracer.py says how. From these
follows a time. It is a PREDICTION, under the assumptions that are printed with it: nothing is measured.
"""

import argparse
import contextlib
import datetime
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
from common import make_example, pack_examples
from one_kernel import replaced
from prediction import ASSUMPTIONS, GPUS, Trace, kernel_seconds, predict
from tracer import PHASES, Tracer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints lines when it is imported
    import finetune_hf_trainer_docvqa as docvqa
    from phi3v import Phi3VConfig, Phi3VForCausalLM
    from phi3v.model import fused as fused_functions
    from phi3v.model import modeling_phi3v
    from phi3v.model.adapters import inner_model
    from phi3v.model.loading import not_quantized
    from phi3v.training.activation_checkpointing import set_tower_checkpointing
    from phi3v.training.costs import Costs
    from phi3v.training.workload import workload_of_packing

TASKS = {"documents": ("4x4", 4), "images": ("1x2", 16)}  # crops of an image, examples in a micro-batch
MODES = {
    "full": {},
    "frozen": {"freeze_vision_model": True},
    "lora": {"use_lora": True},
    "qlora": {"use_lora": True, "use_qlora": True},
}
ATTENTION = {"flash": "flash_attention_2", "sdpa": "sdpa", "varlen": "varlen"}
RECOMPUTE = {"none": "none", "decoder": "decoder", "everything": "all"}
SUPERVISED = 13  # tokens of an answer, like "$1,234.50"


def follow_parts(tracer: Tracer, model: Phi3VForCausalLM):
    """Tells the tracer which module belongs to which part of the model."""
    vision = model.model.vision_embed_tokens
    tower = vision.img_processor.vision_model
    parts = [(model, "head and loss"), (model.model, "embedding and images"), (vision, "projector")]
    parts += [(module, "vision tower") for module in (tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers)]
    for layer in model.model.layers:
        parts += [(layer, "elementwise"), (layer.self_attn, "decoder attention"), (layer.mlp, "decoder MLP")]
        parts += [(layer.input_layernorm, "norms"), (layer.post_attention_layernorm, "norms")]
    for module, part in [*parts, (model.model.norm, "norms"), (model.model.rotary_emb, "rotary")]:
        tracer.follow(module, part)


def make_model(config: Phi3VConfig, mode: str, attention: str):
    """A model on the meta device in bf16, of which trains what the scripts train. Adapters are in bf16 too: autocast's
    copies of them are not counted."""
    with torch.device("meta"):
        model = Phi3VForCausalLM(config).to(torch.bfloat16)
        arguments = docvqa.RecipeArguments(**MODES[mode])
        model = docvqa.choose_trained(model, arguments).to(torch.bfloat16).train()
    inner_model(model).config._attn_implementation = ATTENTION[attention]
    return model


@contextlib.contextmanager
def fused(wanted: bool):
    """Elementwise functions are fused within, as training fuses them on a GPU."""
    if wanted:
        fused_functions.compile_all(torch.device("meta"))
    yield
    fused_functions.turn_off()


def trace(model, examples: list[dict], recompute: str = "none", quantized: bool = False, fuse: bool = True) -> Trace:
    """One micro-batch forward and backward."""
    inner, tracer = inner_model(model), Tracer()
    if recompute != "none":
        set_tower_checkpointing(model, RECOMPUTE[recompute])
        inner.activation_checkpointing_enable({"use_reentrant": False, "context_fn": tracer.checkpoint_contexts})
    batch = pack_examples(examples)
    costs = Costs(model)
    workload = workload_of_packing(batch["packing"])
    follow_parts(tracer, inner)
    if quantized:
        keep = not_quantized(False)[0]
        modules = {name: m for name, m in inner.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
        weights = [m.weight for name, m in modules.items() if "lora_" not in name and keep not in name]
        tracer.quantized = {weight.untyped_storage()._cdata for weight in weights}
    functions = {name: f for name, f in vars(modeling_phi3v).items() if name.startswith("rotate") and callable(f)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced())
        stack.enter_context(fused(fuse))
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(modeling_phi3v, name, tracer.following(function, "rotary")))
        stack.enter_context(tracer)
        batch = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        tracer.backward(model(**batch).loss)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    adapters = inner is not model
    return Trace(tracer.kernels, tracer.operations, workload, costs.flops(workload), trained, adapters)


def make_examples(options: argparse.Namespace) -> list[dict]:
    grid = tuple(int(n) for n in options.crops.split("x"))
    examples = []
    for i in range(options.micro_batch):
        page = i // options.questions
        same = examples[-1] if i % options.questions else None
        examples.append(
            make_example(
                [grid] * options.images,
                page,
                text_tokens=options.text_tokens,
                supervised=min(SUPERVISED, options.text_tokens - 1),
                tiles=same and same["tiles"],
            )
        )
    return examples


def run(options: argparse.Namespace, config: Phi3VConfig | None = None) -> Trace:
    """config: of a smaller model; by default that of Phi-3.5-vision."""
    factors = {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
    model = make_model(config or Phi3VConfig(rope_scaling=factors), options.mode, options.attention)
    torch.manual_seed(0)
    return trace(model, make_examples(options), options.recompute, options.mode == "qlora", not options.no_fuse)


def predictions(found: Trace, options: argparse.Namespace) -> dict[str, dict | None]:
    """By GPU; None for a GPU that does not have this kind of attention."""
    micro_batches = options.batch_size // (options.gpus * options.micro_batch)
    return {
        name: predict(found, gpu, micro_batches, options.gpus, options.zero)
        if gpu.has_flash or options.attention == "sdpa"
        else None
        for name, gpu in GPUS.items()
    }


def describe(options: argparse.Namespace) -> str:
    images = f"{options.images} images" if options.images > 1 else "an image"
    shared = f", {options.questions} examples share theirs" if options.questions > 1 else ""
    return (
        f"{options.micro_batch} examples in a micro-batch, each with {images} of {options.crops} crops{shared}, and "
        f"{options.text_tokens} text tokens; {options.mode}, {options.attention}, recomputed: {options.recompute}; "
        f"{options.batch_size} examples a step on {options.gpus} GPUs with ZeRO-{options.zero}"
    )


def report(found: Trace, options: argparse.Namespace):
    work, launches = found.workload, {p: int(found.total("launches", phase=p)) for p in PHASES}
    print(describe(options))
    print(f"tokens             {work.tokens:,}, {work.crops} crops, {work.targets} supervised tokens")
    print(
        f"launches           {sum(launches.values()):,}: " + ", ".join(f"{p} {n:,}" for p, n in launches.items() if n)
    )
    print(f"host's operations  {sum(found.operations.values()):,}, views included")
    kinds = {kind: found.total("flops", kind=kind) / 1e12 for kind in ("matrix", "attention")}
    print(
        f"FLOPs              {found.flops / 1e12:.1f} TFLOP that the mathematics needs; the kernels compute "
        f"{kinds['matrix']:.1f} in matrix products and {kinds['attention']:.1f} in attention"
    )
    print(f"memory-bound       {found.total('moved', kind='memory') / 1e9:.0f} GB read and written in a micro-batch")
    if options.by:
        parts = sorted(
            {(getattr(k, options.by), k.phase) for k in found.kernels}, key=lambda x: (x[0], PHASES.index(x[1]))
        )
        heads = "".join(f"{f'{name}, ms':>14}" for name in GPUS)
        print(f"\n{options.by:45}{'phase':14}{'launches':>9}{'TFLOP':>8}{'memory GB':>11}{heads}")
        for part, phase in parts:
            own = [k for k in found.kernels if getattr(k, options.by) == part and k.phase == phase]
            flops, moved = sum(k.flops for k in own), sum(k.moved for k in own if k.kind == "memory")
            times = "".join(f"{sum(kernel_seconds(k, gpu) for k in own) * 1e3:>14.1f}" for gpu in GPUS.values())
            print(f"{part:45}{phase:14}{len(own):>9,}{flops / 1e12:>8.1f}{moved / 1e9:>11.1f}{times}")
    predicted = predictions(found, options)
    names = [name for name in next(iter(predicted.values())) if name != "mfu"]
    print("\nPREDICTED, not measured; times in ms")
    print(f"{'GPU':10}" + "".join(f"{name.replace('_', '-'):>12}" for name in names) + f"{'examples/s':>12}{'MFU':>8}")
    for name, seconds in predicted.items():
        if seconds is None:
            print(f"{name:10}  has no kernel for {options.attention}: --attention sdpa")
            continue
        times = "".join(f"{seconds[n] * 1e3:>12.1f}" for n in names)
        print(f"{name:10}{times}{options.batch_size / seconds['step']:>12.1f}{seconds['mfu']:>8.1%}")
    print(f"\n{ASSUMPTIONS}")
    print(
        f"\n{'GPU':10}{'peak TFLOP/s':>13}{'matrix':>8}{'attention':>11}{'backward':>10}{'memory TB/s':>13}"
        f"{'shortest µs':>13}{'sends GB/s':>12}{'buckets ms':>12}"
    )
    for name, gpu in GPUS.items():
        print(
            f"{name:10}{gpu.peak / 1e12:>13.0f}{gpu.matrix:>8.0%}{gpu.attention:>11.0%}{gpu.attention_backward:>10.0%}"
            f"{gpu.bandwidth / 1e12:>13.2f}{gpu.shortest * 1e6:>13.1f}{gpu.link / 1e9:>12.0f}{gpu.buckets * 1e3:>12.0f}"
        )


TABLE = {
    "4 pages": {},
    "4 pages, everything recomputed": {"recompute": "everything"},
    "4 pages, frozen vision": {"mode": "frozen"},
    "4 pages, LoRA": {"mode": "lora"},
    "4 pages, QLoRA": {"mode": "qlora"},
    "4 pages, sdpa": {"attention": "sdpa"},
    "4 questions about one page": {"questions": 4},
    "1 page": {"micro_batch": 1},
    "16 small images": {"task": "images"},
    "16 small images, sdpa": {"task": "images", "attention": "sdpa"},
    "2 small images, 16 a step": {"task": "images", "micro_batch": 2, "batch_size": 16},
    "1 small image, 16 a step": {"task": "images", "micro_batch": 1, "batch_size": 16},
    "1 small image": {"task": "images", "micro_batch": 1, "batch_size": 128},
    "1 small image, ZeRO-1": {"task": "images", "micro_batch": 1, "batch_size": 128, "zero": 1},
    "1 small image, sdpa": {"task": "images", "micro_batch": 1, "batch_size": 128, "attention": "sdpa"},
}


def print_table(options: argparse.Namespace):
    """The rows of docs/performance.md."""
    print(f"`python benchmarks/trace.py --table`, {datetime.date.today()}:\n")
    print("| micro-batch | launches | memory-bound GB | " + " | ".join(GPUS) + " |")
    print("| --- " * (len(GPUS) + 3) + "|")
    for name, changes in TABLE.items():
        case = complete(argparse.Namespace(**vars(options) | changes))
        found = run(case)
        cells = [
            f"{p['mfu']:.1%}, {case.batch_size / p['step']:.3g}/s" if p else "–"
            for p in predictions(found, case).values()
        ]
        moved = found.total("moved", kind="memory") / 1e9
        print(f"| {name} | {len(found.kernels):,} | {moved:.0f} | {' | '.join(cells)} |", flush=True)


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """Fills in what the task decides where a flag was not given."""
    crops, micro_batch = TASKS[options.task]
    options.crops, options.micro_batch = options.crops or crops, options.micro_batch or micro_batch
    options.batch_size = options.batch_size or max(64, options.gpus * options.micro_batch)
    return options


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="documents", help="sets --crops and --micro_batch")
    parser.add_argument("--crops", help="sub-crops of an image, down x across: 4x4, or 1x2 for images")
    parser.add_argument("--images", type=int, default=1, help="images of an example")
    parser.add_argument("--questions", type=int, default=1, help="neighbouring examples that have the same images")
    parser.add_argument("--text_tokens", type=int, default=50, help="of an example")
    parser.add_argument("--micro_batch", type=int, help="examples in a micro-batch: 4, or 16 for images")
    parser.add_argument("--batch_size", type=int, help="examples in an optimizer step: 64, or more if they do not fill")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--attention", choices=ATTENTION, default="flash")
    parser.add_argument("--recompute", choices=RECOMPUTE, default="none")
    parser.add_argument("--no_fuse", action="store_true", help="as in training: elementwise functions are not fused")
    parser.add_argument("--zero", type=int, choices=(1, 2), default=2, help="ZeRO's stage")
    parser.add_argument(
        "--by", choices=("part", "kind", "name"), help="also print what parts, kinds or operations cost"
    )
    parser.add_argument("--json", action="store_true", help="print what was counted and predicted as JSON")
    parser.add_argument("--table", action="store_true", help="print the table of docs/performance.md")
    options = parser.parse_args(argv)
    if not options.table:
        complete(options)
        if options.batch_size % (options.gpus * options.micro_batch):
            parser.error("--batch_size must be a multiple of --gpus x --micro_batch")
    return options


def main():
    options = parse()
    if options.table:
        return print_table(options)
    found = run(options)
    if not options.json:
        return report(found, options)
    counted = Counter()
    for kernel in found.kernels:
        for field in ("launches", "flops", "moved"):
            key = f"{kernel.part}/{kernel.phase}/{kernel.kind}/{field}"
            counted[key] += 1 if field == "launches" else getattr(kernel, field)
    content = {"options": vars(options), "flops": found.flops, "operations": found.operations, "counted": counted}
    content |= {"predicted": predictions(found, options), "assumptions": ASSUMPTIONS}
    print(json.dumps(content | {"gpus": {name: asdict(gpu) for name, gpu in GPUS.items()}}, indent=2))


if __name__ == "__main__":
    main()
