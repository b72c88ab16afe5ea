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
    Stage("crops", "right", "report_right:crops", "Crops normalised on the device are those of the CPU", 0.3, 2),
]

# Sentences about what remains unproven, whatever has run.
UNPROVEN: list[str] = [
    "The published weights: all weights here are random. Run `--dry_run` of a training script with them.",
    "Accuracy after training on real data.",
    "Several nodes.",
    "Days of training: every stage takes minutes.",
]
