"""The answers of classifiers and taggers, the same for every engine.

In: the scores that a model gives to its labels, before any activation. Out: the numbers of the labels with their
log-probabilities, and a text for people.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lora_probe.recording import Floats


def labelled(scores: Floats, names: Mapping[int, str]) -> tuple[list[int], list[float | None], str]:
    """The label of a prompt (`scores: [labels]`), or of each of its tokens (`[tokens, labels]`). A model with a single
    label, as reward models are, has a score and no label."""
    rows = np.atleast_2d(scores).astype(np.float64)
    if rows.shape[1] == 1:
        return [], [], "score " + " ".join(f"{score:.6g}" for score in rows[:, 0])
    highest = rows.max(axis=1, keepdims=True)
    logprobs = rows - highest - np.log(np.exp(rows - highest).sum(axis=1, keepdims=True))
    labels = [int(label) for label in rows.argmax(axis=1)]
    chosen = [round(float(row[label]), 6) for row, label in zip(logprobs, labels, strict=True)]
    return labels, list(chosen), " ".join(str(names.get(label, label)) for label in labels)
