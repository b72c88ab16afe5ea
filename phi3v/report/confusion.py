"""The confusion matrix of an evaluation whose right answers are few, as in classification."""

from collections import Counter

from .statistics import RIGHT_SCORE

MOST_CLASSES = 30  # a larger table is not readable
EXAMPLES_PER_CLASS = 2  # on average, at least; with fewer, most cells of the table would be empty


def confusion_matrix(report: dict) -> dict | None:
    """How often each right answer got which answer; None if the data are no classification with few classes.

    A prediction that the metric counts as right is one of the right class. Other predictions count as a class if they
    differ from its name in nothing but case, surrounding blanks and a final full stop; the rest is "others".
    Returns "classes" (names, in the order of the alphabet), "rows" (one for each class: its name, "total", and "cells"
    with "count", "share" of the row and whether it is "right", in the order of "classes" and then "others" if there are
    any), "others" (how many there are) and "examples_of_others" (the most frequent ones with their counts).
    """
    rows = report["predictions"]
    names: dict[str, str] = {}  # the first spelling of each class
    counts, others = Counter(), Counter()
    for row in rows:
        answers = {folded(answer): str(answer).strip() for answer in reversed(row["answers"])}
        if len(answers) != 1:
            return None
        for key, name in answers.items():
            names.setdefault(key, name)
        if len(names) > MOST_CLASSES:
            return None
    if len(names) < 2 or len(rows) < EXAMPLES_PER_CLASS * len(names):
        return None
    for row in rows:
        right, given = folded(row["answers"][0]), folded(row["prediction"])
        if row["score"] >= RIGHT_SCORE:
            given = right
        elif given == right or given not in names:
            others[str(row["prediction"]).strip()] += 1
            given = None
        counts[right, given] += 1
    keys = sorted(names)
    columns = [*keys, *([None] if others else [])]
    totals = {key: sum(counts[key, column] for column in columns) for key in keys}
    table = [
        {
            "name": names[key],
            "total": totals[key],
            "cells": [
                {"count": counts[key, c], "share": round(counts[key, c] / totals[key], 4), "right": c == key}
                for c in columns
            ],
        }
        for key in keys
    ]
    return {
        "classes": [names[key] for key in keys],
        "rows": table,
        "others": others.total(),
        "examples_of_others": others.most_common(3),
    }


def folded(text) -> str:
    """The text without differences in case, surrounding blanks and a final full stop."""
    return str(text).strip().rstrip(".").casefold()
