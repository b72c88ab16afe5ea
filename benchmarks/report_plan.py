"""The stages of gpu_report.py, and what no run of it can prove."""

from report_parts import Stage

GROUPS = {
    "right": "The results are right on this device",
    "fast": "The speed of this device",
    "memory": "Measured memory beside what --estimate says",
    "many": "Several GPUs",
}

# Name, group, function, what it proves, minutes on an H100, importance (1 first), needs.
STAGES: list[Stage] = [
    Stage(
        "golden",
        "right",
        "report_right:golden",
        "In fp32, logits, loss and gradients are those of the official implementation",
        0.4,
        1,
    ),
    Stage("half", "right", "report_right:half", "In bf16 and fp16, results differ from fp32 by rounding alone", 0.4, 1),
    Stage(
        "packing",
        "right",
        "report_right:packing",
        "Examples of a packed row are computed as each alone, and none sees its neighbour",
        0.5,
        1,
    ),
    Stage(
        "sharing", "right", "report_right:sharing", "Examples that share images are computed as without sharing", 0.4, 1
    ),
    Stage("attention", "right", "report_right:attention", "Every attention kernel computes what sdpa computes", 0.7, 1),
    Stage(
        "gradients",
        "right",
        "report_trained:gradients",
        "In every mode, every tensor that trains gets a finite gradient, and no other does",
        2,
        1,
        ("peft",),
    ),
    Stage(
        "functions",
        "right",
        "report_right:functions",
        "Hand-written gradients and fused functions are those of plain torch",
        1.2,
        2,
    ),
    Stage("crops", "right", "report_right:crops", "Crops normalised on the device are those of the CPU", 0.3, 2),
    Stage(
        "generation",
        "right",
        "report_right:generation",
        "Answers are the same with and without a cache, in a batch of 8 and alone",
        0.7,
        2,
    ),
    Stage(
        "fp16",
        "right",
        "report_trained:fp16",
        "Training in fp16 with loss scaling learns what fp32 learns, over 50 steps",
        0.5,
        2,
    ),
    Stage(
        "qlora",
        "right",
        "report_trained:qlora",
        "Layers in 4 bits compute what their dequantised weights compute",
        0.8,
        2,
        ("bitsandbytes", "peft"),
    ),
    Stage(
        "resume",
        "right",
        "report_trained:resume",
        "A training that was killed ends, after resuming, with the weights of one that was not",
        1.2,
        2,
        ("peft", "datasets"),
    ),
]

STAGES += [
    Stage("fast-lora", "fast", "report_fast:lora", "LoRA trains, and how fast with each kernel", 1.3, 2),
    Stage("fast-full", "fast", "report_fast:full", "Full fine-tuning trains, and how fast with each kernel", 1.3, 3),
    Stage("fast-qlora", "fast", "report_fast:qlora", "QLoRA trains, and how fast with each kernel", 1.6, 4),
    Stage("fast-frozen", "fast", "report_fast:frozen", "A frozen vision model is faster, and by how much", 1.3, 6),
    Stage("answers", "fast", "report_fast:generation", "Answers in batches of 8 are faster than single ones", 0.8, 4),
    Stage(
        "small-images", "fast", "report_fast:small", "Filling micro-batches of small images pays, and how much", 1.2, 5
    ),
    Stage(
        "shared-images", "fast", "report_fast:shared", "Sharing an image between questions pays, and how much", 1.2, 5
    ),
    Stage(
        "profile-lora", "fast", "report_profile:lora", "Where the time of a LoRA step goes, as predicted or not", 1.3, 5
    ),
    Stage(
        "profile-full", "fast", "report_profile:full", "Where the time of a full step goes, as predicted or not", 1.3, 6
    ),
    Stage("memory-lora", "memory", "report_memory:lora", "The estimate of LoRA's memory is right to 10%", 1.0, 2),
    Stage("memory-full", "memory", "report_memory:full", "The estimate of full fine-tuning is right to 10%", 1.0, 3),
    Stage("memory-qlora", "memory", "report_memory:qlora", "The estimate of QLoRA's memory is right to 10%", 1.2, 4),
    Stage(
        "memory-frozen",
        "memory",
        "report_memory:frozen",
        "The estimate with a frozen vision model is right to 10%",
        1.0,
        6,
    ),
    Stage("equal-losses", "many", "report_many:losses", "ZeRO-2, 1, 3 and DDP have the losses of one process", 3.0, 2),
    Stage("scaling", "many", "report_many:scaling", "More GPUs train faster, and how much", 2.5, 4),
]

# Sentences about what remains unproven, whatever has run.
UNPROVEN: list[str] = [
    "The published weights: all weights here are random. Run `--dry_run` of a training script with them.",
    "Accuracy after training on real data.",
    "Several nodes.",
    "Days of training: every stage takes minutes.",
]
