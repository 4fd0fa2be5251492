"""A scored pass on disk: one answer, run again in one forward pass.

In: the file `next-N.safetensors` of a process, from an untrusted source. Out: `Scored`, checked; its distributions are
read when they are requested.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from lora_probe.errors import UnreadableFile
from lora_probe.files import brief
from lora_probe.files.values import MAX_VALUES
from lora_probe.files.weights import TensorHeader, WeightsFile
from lora_probe.recording.documents import decoded
from lora_probe.recording.placed import Floats
from lora_probe.recording.records import Score
from lora_probe.recording.segments import open_recorded, values


@dataclass(frozen=True)
class Scored:
    """One scored pass. Its distributions stay on disk: a whole vocabulary for every token takes too much memory."""

    path: Path
    score: Score

    def logprobs(self) -> Floats | None:
        """`[answer tokens, vocabulary]`, read from disk; None if they were not measured.

        Raises:
            UnreadableFile: the file is damaged.
        """
        weights = open_recorded(self.path, "a scored pass")
        header = _distributions(weights, self.score)
        return None if header is None else values(weights, header)


def open_scored(path: Path) -> Scored:
    weights = open_recorded(path, "a scored pass")
    text = weights.metadata.get("score")
    if text is None:
        raise _no_score(path, "its metadata has no `score`")
    try:
        score = decoded(text, msgspec.json.Decoder(Score))
    except ValueError as error:
        raise _no_score(path, f"its `score` cannot be read: {error}") from error
    if min((score.prompt, *score.prompt_ids, *score.answer_ids)) < 0:
        raise _no_score(path, "its prompt number, or a token id, is negative")
    _distributions(weights, score)
    return Scored(path, score)


def _distributions(weights: WeightsFile, score: Score) -> TensorHeader | None:
    """The tensor of a pass's distributions; None if they were not measured."""
    header = weights.tensors.get("logprobs")
    if header is None:
        return None
    answers, last = len(score.answer_ids), max(score.answer_ids, default=-1)
    if header.dtype != "F32" or len(header.shape) != 2 or header.shape[0] != answers:
        is_now = f"{header.dtype} {brief(list(header.shape))}"
        raise _no_score(weights.path, f"`logprobs` is {is_now}, expected F32 [{answers}, vocabulary]")
    if last >= header.shape[1]:
        raise _no_score(weights.path, f"its answer contains token {last}, but its vocabulary has {header.shape[1]}")
    if header.parameters > MAX_VALUES:
        raise _no_score(weights.path, f"it has {header.parameters} values, more than the limit of {MAX_VALUES}")
    return header


def _no_score(path: Path, why: str) -> UnreadableFile:
    return UnreadableFile(f"the scored pass `{path}` is damaged: {why}", "copy the trace again, or record it again")
