"""The data in short."""


def describe_sizes(sizes: list, n_evaluation: int) -> dict[str, str]:
    """The data in short: how many examples, how long."""
    tokens, crops = (sorted(getattr(s, name) for s in sizes) for name in ("tokens", "crops"))
    middle = len(sizes) // 2

    def span(values, unit):
        if values[0] == values[-1]:
            return f"{values[0]:,} {unit}"
        return f"{values[0]:,} to {values[-1]:,} {unit}, median {values[middle]:,}"

    return {
        "training examples": f"{len(sizes):,}",
        "evaluation examples": f"{n_evaluation:,}",
        "an example": span(tokens, "tokens"),
        "images of an example": span(crops, "crops"),
    }
