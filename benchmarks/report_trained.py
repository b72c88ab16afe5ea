"""The stages of gpu_report.py about training: gradients in every mode, fp16, QLoRA's kernels, resuming after a kill."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from report_models import (
    choose_trained,
    exact_products,
    has_exact_zero_gradient,
    loss_and_gradients,
    make_config,
    make_example,
    make_model,
    packed,
    quantize,
)
from report_parts import ROOT, Check, LeftOut, Row, Setting, at_most, must_be
from report_right import LAYERS, half_dtypes, together

Found = list[Check | Row | LeftOut]
MODES = {  # flags of the scripts
    "full": {},
    "frozen vision": {"freeze_vision_model": True},
    "frozen vision, projector trains": {"freeze_vision_model": True, "train_projector": True},
    "LoRA": {"use_lora": True},
    "LoRA, frozen vision": {"use_lora": True, "freeze_vision_model": True},
    "DoRA, separators train": {"use_lora": True, "use_dora": True, "train_separators": True},
    "QLoRA": {"use_lora": True, "use_qlora": True},
}


def empty_cache():
    """Gives back the memory of everything that is no longer used."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache() if hasattr(torch.accelerator, "empty_cache") else torch.cuda.empty_cache()


# ---- Gradients


def gradients(setting: Setting) -> Found:
    """In every mode, every tensor that trains gets a gradient of finite numbers, and no other tensor gets one."""
    found, halves = [], half_dtypes(setting)
    precision = "bf16" if "bf16" in halves else "fp16"
    for mode, flags in MODES.items():
        if "use_qlora" in flags and "bitsandbytes" not in setting.facts["packages"]:
            found.append(LeftOut(mode, "it needs the package bitsandbytes"))
            continue
        try:
            found += gradients_of_mode(setting, mode, flags, halves[precision])
        except torch.OutOfMemoryError:
            found.append(LeftOut(f"gradients, {mode}", "it does not fit into the memory of this device"))
        empty_cache()
    return found


def gradients_of_mode(setting: Setting, mode: str, flags: dict, dtype: torch.dtype) -> Found:
    model = base = make_model(setting, make_config(setting), dtype)
    if "use_qlora" in flags:
        quantize(base, dtype)
    model = choose_trained(base, **flags).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # with zeros, as adapters begin, lora_A would have no gradient
                parameter.normal_(std=0.02)
    base.activation_checkpointing_enable({"use_reentrant": False})
    random = torch.Generator().manual_seed(0)
    examples = [make_example(setting, random, [(1, 2)], 40, 13), make_example(setting, random, [], 60, 50)]
    scale = 1024 if dtype == torch.float16 else 1  # as loss scaling does, so that small gradients do not become 0
    # Adapters in fp32 train under autocast; DeepSpeed trains weights in half precision without it.
    with torch.autocast(setting.device, dtype, enabled="use_lora" in flags):
        loss = model(**packed(setting, examples), num_items_in_batch=63).loss
    (loss * scale).backward()
    lost, strange, unwanted = [], [], []
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if not parameter.requires_grad:
            unwanted += [name] if grad is not None else []
        elif grad is None or not (grad.any() or has_exact_zero_gradient(name) and "lora_" not in name):
            lost.append(name)
        elif not grad.isfinite().all():
            strange.append(name)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    found = [Row("Gradients", {"mode": mode, "tensors that train": trained, "loss": loss.item()})]
    for problem, names in (("no gradient", lost), ("NaN or infinity", strange), ("a gradient while frozen", unwanted)):
        wrong = f"tensors with {problem}, such as {', '.join(names[:3])}"
        found.append(must_be(f"tensors with {problem}, {mode}", len(names), 0, wrong))
    return [*found, must_be(f"any tensor trains, {mode}", trained > 0, True, "no tensor trains")]


# ---- fp16

STEPS = 50


def fp16(setting: Setting) -> Found:
    """50 steps in fp16 with loss scaling, with fp32 weights under autocast, beside the same steps in fp32."""
    results = []
    random = torch.Generator().manual_seed(0)
    batch = packed(
        setting, [make_example(setting, random, [(1, 1)], 20, 13), make_example(setting, random, [], 30, 20)]
    )
    with exact_products():
        for half in (False, True):
            results.append(train(setting, batch, half))
            empty_cache()
    (exact, *_), (losses, skipped, scale) = results
    taken = [loss for step, loss in enumerate(losses) if step not in skipped]  # the steps that changed the weights
    apart = max((abs(a - b) / exact[0] for a, b in zip(taken, exact, strict=False)), default=float("inf"))
    found = [
        Row("Loss in fp16 and fp32", {"step": step + 1, "fp16, loss scaling": losses[step], "fp32": exact[step]})
        for step in (0, STEPS // 5, STEPS // 2, STEPS - 1)
    ]
    wrong = "training in fp16 with loss scaling does not learn what fp32 learns"
    found.append(at_most("loss after the last step as a share of the first, fp16", losses[-1] / losses[0], 0.7, wrong))
    found.append(at_most("largest distance to fp32's loss, as a share of the first loss", apart, 0.05, wrong))
    wrong = "gradients in fp16 hold infinity or NaN again and again"
    found.append(at_most("steps that loss scaling skipped", len(skipped), 5, wrong))
    return [*found, at_most("a loss scale of at least 256: 256 / scale", 256 / scale, 1, f"{wrong}; the scale shrinks")]


def train(setting: Setting, batch: dict, half: bool) -> tuple[list[float], list[int], float]:
    """The losses, the steps that loss scaling skipped, and the last loss scale."""
    model = make_model(setting, make_config(setting, LAYERS), torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3 if setting.tiny else 5e-5, eps=1e-7)
    scaler = torch.amp.GradScaler(setting.device, enabled=half)
    losses, skipped = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(setting.device, torch.float16, enabled=half):
            loss = model(**batch, num_items_in_batch=33).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += [step] if scaler.get_scale() < before else []
        losses.append(loss.item())
    return losses, skipped, scaler.get_scale()


# ---- QLoRA


def qlora(setting: Setting) -> Found:
    """Layers in 4 bits against the same layers with dequantised weights, and quantised weights against those before."""
    import bitsandbytes as bnb

    found = []
    shapes = [(9216, 3072), (3072, 3072), (16384, 3072), (3072, 8192)] if not setting.tiny else [(576, 192), (192, 256)]
    for precision, dtype in half_dtypes(setting).items():
        for out, width in shapes:
            torch.manual_seed(0)
            linear = torch.nn.Linear(width, out, bias=False).to(dtype)
            layer = one_layer(setting, linear, dtype)
            restored = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
            name, exact = f"{out} x {width} in {precision}", linear.weight.to(setting.device).float()
            error = (restored.float() - exact).norm() / exact.norm()
            found.append(at_most(f"NF4, {name}", error, 0.13, "weights in 4 bits are not those that were quantised"))
            for rows in (1, 200):  # one row has a kernel of its own
                wrong = "bitsandbytes computes something else than the dequantised weights"
                x = torch.randn(rows, width, device=setting.device, dtype=dtype)
                limit, weights = 4 * torch.finfo(dtype).eps, torch.randn(rows, out, device=setting.device, dtype=dtype)
                results = []
                for function in (layer, lambda own, w=restored: F.linear(own, w)):
                    with torch.no_grad():
                        answer = function(x)  # without a gradient, the kernel is another
                    own = x.clone().requires_grad_()
                    (output := function(own)).backward(weights)
                    results.append([answer.float(), output.detach().float(), own.grad.float()])
                names = ("inference", "forward", "gradient")
                for part, a, b in zip(names, *results, strict=True):
                    error = (a - b).norm() / b.norm()
                    found.append(at_most(f"{part}, {rows} rows, {name}", error, limit, f"{wrong}: {part}"))
        found += qlora_model(setting, precision, dtype)
        empty_cache()
    return found


def one_layer(setting: Setting, linear: torch.nn.Linear, dtype: torch.dtype):
    """A layer in 4 bits, as QLoRA's base has it, on the device."""
    holder = torch.nn.Module()
    holder.model = torch.nn.Module()
    holder.model.layers = torch.nn.Module()
    holder.model.layers.only = linear.to(setting.device)
    layer = quantize(holder, dtype).model.layers.only
    layer.support_avx512bf16_for_cpu = False  # `add_adapter` says why
    return layer


def qlora_model(setting: Setting, precision: str, dtype: torch.dtype) -> Found:
    """A model with adapters on a base in 4 bits, against the same adapters on the dequantised base."""
    import bitsandbytes as bnb

    random = torch.Generator().manual_seed(0)
    batch = packed(
        setting, [make_example(setting, random, [(1, 2)], 40, 13), make_example(setting, random, [], 60, 50)]
    )
    results, in_4_bits = [], []
    for four_bits in (True, False):
        model = base = quantize(make_model(setting, make_config(setting, LAYERS), dtype), dtype)
        if not four_bits:
            for name, layer in list(base.named_modules()):
                if isinstance(layer, bnb.nn.Linear4bit):
                    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                    plain = torch.nn.Linear(1, 1, bias=False)
                    plain.weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
                    plain.in_features, plain.out_features = layer.in_features, layer.out_features
                    parent, _, own = name.rpartition(".")
                    setattr(base.get_submodule(parent), own, plain)
            base.is_loaded_in_4bit = base.is_quantized = False
        torch.manual_seed(1)
        model = choose_trained(base, use_lora=True, lora_rank=8).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    own = torch.Generator().manual_seed(len(name) + parameter.numel())
                    parameter.copy_(torch.randn(parameter.shape, generator=own) * 0.02)
        with torch.autocast(setting.device, dtype):
            results.append(loss_and_gradients(model, batch, 63))
        in_4_bits.append(sum(isinstance(layer, bnb.nn.Linear4bit) for layer in base.modules()))
    (loss, own), (plain_loss, plain) = results
    wrong = "the model in 4 bits is not that with dequantised weights"
    error = together(own, plain)
    eps = torch.finfo(dtype).eps
    return [
        must_be(f"layers in 4 bits, and in the other model, {precision}", in_4_bits, [4 * LAYERS, 0], wrong),
        at_most(f"loss with adapters, {precision}", abs(loss - plain_loss) / plain_loss, eps, wrong),
        at_most(f"gradients of adapters, {precision}", error, 4 * eps, wrong),
    ]


# ---- Resuming

TASK = "hateful_memes"
FLAGS = "--num_crops 1 --max_train_samples 48 --max_steps 12 --save_steps 4 --batch_size 4 --batch_size_per_gpu 2"
FLAGS += " --learning_rate 1e-3 --no_eval_before --max_new_tokens 2 --max_eval_samples 2 --no_tqdm --logging_steps 4"
FLAGS += " --dataloader_num_workers 1 --report_to none --fp32 --resume_from_checkpoint auto"


def start_script(setting: Setting, data: Path, out: Path) -> subprocess.Popen:
    """Starts the training script under torchrun, with one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += [str(ROOT / f"finetune_hf_trainer_{TASK}.py"), "--data_dir", str(data), "--output_dir", str(out)]
    command += ["--model_name_or_path", str(ROOT / "demo" / "base_checkpoint"), *FLAGS.split()]
    if "deepspeed" not in setting.facts["packages"]:
        command += ["--deepspeed", "none"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)


def kill_whole(run: subprocess.Popen):
    """SIGKILL to torchrun and to the processes that it has started."""
    import psutil

    for process in [*psutil.Process(run.pid).children(recursive=True), psutil.Process(run.pid)]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    run.wait()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def end_of(out: Path) -> str:
    """The last lines of a training's log, for an error."""
    lines = [line.strip() for line in out.with_suffix(".log").read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return " / ".join(errors[-2:] or lines[-2:])[:400]


def resume(setting: Setting) -> Found:
    """A training script is killed after a checkpoint and started again, and ends with the weights of a run without."""
    data, reference, killed = (setting.folder / name for name in ("data", "reference", "killed"))
    subprocess.run(
        [sys.executable, str(ROOT / "demo" / "make_data.py"), "--task", TASK, "--out_dir", str(data)], check=True
    )
    whole, victim = (start_script(setting, data, out) for out in (reference, killed))
    while not (killed / "checkpoint-4").exists():
        if victim.poll() is not None:
            raise RuntimeError(f"a training ended before its first checkpoint: {end_of(killed)}")
        time.sleep(0.005)
    kill_whole(victim)
    steps = sorted(int(path.name[11:]) for path in killed.glob("checkpoint-*"))
    checks = [
        must_be("killed before its end", (killed / "model.safetensors").exists(), False, "it was not killed in time")
    ]
    at_kill = weights(killed / f"checkpoint-{steps[-1]}")
    resumed = start_script(setting, data, killed)
    for run, out in ((whole, reference), (resumed, killed)):
        if status := run.wait():
            raise RuntimeError(f"a training ended with status {status}: {end_of(out)}")
    log = killed.with_suffix(".log").read_text(errors="replace")
    found = [line for line in log.splitlines() if "resuming" in line and f"checkpoint-{steps[-1]}" in line]
    checks.append(must_be("it resumed from the checkpoint", bool(found), True, "the second start began from nothing"))
    return checks + compare_weights(setting, weights(reference), weights(killed), at_kill)


def compare_weights(setting: Setting, whole: dict, resumed: dict, at_kill: dict) -> Found:
    """whole, resumed: final weights without and with a kill; at_kill: those of the checkpoint."""

    def distance(a, b):
        return sum((a[name].double() - b[name].double()).square().sum().item() for name in whole) ** 0.5

    same, moved = all(torch.equal(whole[n], resumed[n]) for n in whole), distance(whole, at_kill)
    apart = distance(whole, resumed)
    wrong = "a run that was killed and resumed ends with other weights than one that was not"
    checks = [
        must_be("training went on after the checkpoint", moved > 0, True, "the checkpoint has the final weights"),
        at_most(
            "distance of the weights as a share of how far they moved after the checkpoint",
            apart / max(moved, 1e-30),
            0.0 if setting.device == "cpu" else 0.01,  # some kernels of a GPU add numbers in any order
            wrong,
        ),
    ]
    return [
        *checks,
        Row("Resuming", {"equal to the bit": same, "distance": apart, "moved after the checkpoint": moved}),
    ]
