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

# Sentences about what remains unproven, whatever has run.
UNPROVEN: list[str] = [
    "The published weights: all weights here are random. Run `--dry_run` of a training script with them.",
    "Accuracy after training on real data.",
    "Several nodes.",
    "Days of training: every stage takes minutes.",
]
