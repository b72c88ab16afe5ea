"""Statistics of evaluations: confidence intervals, and the comparison of two evaluations example by example."""

import math
from collections import Counter

import numpy as np

RIGHT_SCORE = 0.5  # an answer with this score or more counts as right; ANLS gives no score between 0 and this one
Z = 1.959964  # 95% of the normal distribution lie within this many standard deviations of the mean
RESAMPLES = 2000


def confidence_interval(scores: list[float]) -> tuple[float, float, str]:
    """The low and the high end of the 95% confidence interval of the mean score, and the method's name.

    If all scores are 0 or 1, this is Wilson's interval (J. Am. Stat. Assoc. 22, 1927); otherwise it has the percentiles
    of a bootstrap with a fixed seed. Raises ValueError if there are no scores.
    """
    if not scores:
        raise ValueError("there are no scores")
    n, mean = len(scores), sum(scores) / len(scores)
    if set(scores) <= {0, 1}:
        middle = (mean + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * math.sqrt(mean * (1 - mean) / n + Z**2 / (4 * n**2))
        return max(middle - half, 0.0), min(middle + half, 1.0), "Wilson"
    return _bootstrap(scores)


def interval_of_change(changes: list[float]) -> tuple[float, float, str]:
    """The low and the high end of the 95% confidence interval of the mean change of scores, and the method's name.

    changes: for each example the later score minus the earlier one. If all of them are -1, 0 or 1, this is the interval
    of Bonett and Price for paired proportions (J. Educ. Behav. Stat. 37, 2012), which has a width also if no score has
    changed; otherwise it has the percentiles of a bootstrap over the pairs. Raises ValueError if there are no changes.
    """
    if not changes:
        raise ValueError("there are no changes")
    if not set(changes) <= {-1, 0, 1}:
        return _bootstrap(changes)
    n = len(changes) + 2
    up, down = (changes.count(1) + 1) / n, (changes.count(-1) + 1) / n
    half = Z * math.sqrt((up + down - (up - down) ** 2) / n)
    return max(up - down - half, -1.0), min(up - down + half, 1.0), "Bonett and Price"


def _bootstrap(values: list[float]) -> tuple[float, float, str]:
    """As `confidence_interval`, of the mean of any numbers."""
    rng, values = np.random.default_rng(0), np.array(values)
    means = [rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5)).tolist()
    return low, high, f"bootstrap, {RESAMPLES:,} resamples"


def sign_test(n_up: int, n_down: int) -> float:
    """The p-value of the exact two-sided sign test, which is McNemar's test if all scores are 0 or 1.

    n_up, n_down: how many scores rose and fell.
    """
    n = n_up + n_down
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(min(n_up, n_down) + 1)]
    return min(1.0, 2 * sum(math.exp(value - n * math.log(2)) for value in logs))


def result_of(report: dict) -> dict:
    """The metric of an evaluation with its confidence interval; "low" is None if the metric is not the mean score.
    "loss" is the validation loss, None if the evaluation has none."""
    value, scores = report[report["metric"]], [row["score"] for row in report["predictions"]]
    result = {"value": value, "n": report["num_examples"], "low": None}
    result["loss"] = loss if isinstance(loss := report.get("loss"), (int, float)) else None
    if scores and abs(sum(scores) / len(scores) - value) < 1e-6:
        result["low"], result["high"], result["method"] = confidence_interval(scores)
        result["unit"] = 0 <= result["low"] and result["high"] <= 1
    return result


def rows_by_id(report: dict) -> dict[tuple[str, int], dict]:
    """The predictions of an evaluation by id and by how often that id has come, which is 1 unless ids are not unique:
    the first of two equal ids is paired with the first of another evaluation, the second with the second."""
    seen, rows = Counter(), {}
    for row in report["predictions"]:
        seen[str(row["id"])] += 1
        rows[str(row["id"]), seen[str(row["id"])]] = row
    return rows


def paired_rows(before: dict | None, after: dict | None) -> list[dict]:
    """For each example its row in both evaluations, None if it has none, in the order of the later evaluation."""

    old, new = ({} if report is None else rows_by_id(report) for report in (before, after))
    return [{"before": old.get(key), "after": new.get(key)} for key in (old if after is None else new)]


def paired_change(rows: list[dict]) -> dict | None:
    """How the scores of the examples in both evaluations changed; None if there are no such examples."""
    pairs = [(row["before"]["score"], row["after"]["score"]) for row in rows if row["before"] and row["after"]]
    if not pairs:
        return None
    up, down = sum(a > b for b, a in pairs), sum(a < b for b, a in pairs)
    low, high, method = interval_of_change([a - b for b, a in pairs])
    return {
        "n": len(pairs),
        "change": sum(a - b for b, a in pairs) / len(pairs),
        "low": low,
        "high": high,
        "method": method,
        "wrong_right": sum(b < RIGHT_SCORE <= a for b, a in pairs),
        "right_wrong": sum(a < RIGHT_SCORE <= b for b, a in pairs),
        "up": up,
        "down": down,
        "p": sign_test(up, down),
        "graded": not {score for pair in pairs for score in pair} <= {0, 1},
    }
