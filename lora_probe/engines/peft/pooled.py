"""The answers of models that do not generate tokens: classifiers, taggers, and encoders.

In: the output of a forward pass of one of transformers' models. Out: numbers of labels with the logarithms of their
probabilities, none for an encoder; and a text for people.
"""

from __future__ import annotations

from typing import Any

from lora_probe.engines.labels import labelled


def answer_of(result: Any, config: Any) -> tuple[list[int], list[float | None], str]:
    """The label of a prompt, or of each of its tokens, and its log-probability; or a description of its vectors."""
    import torch

    if (logits := getattr(result, "logits", None)) is not None:
        return labelled(logits[0].float().cpu().numpy(), getattr(config, "id2label", None) or {})
    if (starts := getattr(result, "start_logits", None)) is not None:
        spans = torch.log_softmax(torch.stack([starts[0], result.end_logits[0]]).float(), dim=-1)
        ends = spans.argmax(dim=-1).tolist()
        logprobs = [round(float(row[end]), 6) for row, end in zip(spans, ends, strict=True)]
        return ends, list(logprobs), f"tokens {ends[0]} to {ends[1]}"
    vectors = result.last_hidden_state[0].float()
    size = f"{len(vectors)} vectors of {vectors.shape[-1]} numbers"
    return [], [], f"{size}, their mean has norm {float(vectors.mean(dim=0).norm()):.6g}"
