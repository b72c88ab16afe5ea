"""The handwritten digits of the demo: loading them, splitting them, and drawing one."""

import gzip
from pathlib import Path

import numpy as np
from PIL import Image

DIGITS = Path(__file__).parent / "digits.csv.gz"
SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (n, 8, 8) with values 0 to 16, and labels, int (n,), of the split train, val or test.

    This is the only place where the demo splits its data. It splits the digit images, so that neither the base
    checkpoint nor a task ever trains on a digit image of `val` or `test`.
    """
    with gzip.open(DIGITS, "rt") as file:
        rows = np.loadtxt(file, delimiter=",").astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(rows))
    edges = np.cumsum([0, *SHARES.values()]) * len(rows)
    i = list(SHARES).index(split)
    rows = rows[order[round(edges[i]) : round(edges[i + 1])]]
    return rows[:, :64].reshape(-1, 8, 8), rows[:, 64].astype(int)


def draw(canvas: Image.Image, digit: np.ndarray, center: tuple[float, float], side: float, ink: float = 1.0):
    """Draws a dark digit (8, 8) on a light grey-scale canvas.

    center, side: in pixels; ink: how dark it is, from 0 to 1.
    """
    side = max(2, round(side))
    strength = Image.fromarray((digit.astype(float) * (255 / 16) * ink).astype(np.uint8))
    strength = strength.resize((side, side), Image.Resampling.BICUBIC)
    corner = (round(center[0] - side / 2), round(center[1] - side / 2))
    canvas.paste(0, (*corner, corner[0] + side, corner[1] + side), strength)
