"""The class of transformers that an adapter's base is loaded as: that of the task.

In: the config of a base model, and how it was loaded in training. Out: a class, or None. transformers is imported when
it is called.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_probe.adapter import TrainedAs

AUTO = {
    "CAUSAL_LM": ("AutoModelForCausalLM",),
    "SEQ_CLS": (
        "AutoModelForSequenceClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
    ),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "AutoModelForAudioFrameClassification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering",),
    # Embeddings are made with the encoder alone.
    "FEATURE_EXTRACTION": ("AutoModelForTextEncoding", "AutoModel"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq"),
}
"""transformers' classes for each of PEFT's task types; the first that has this type of model counts."""


def class_of(config: Any, trained: TrainedAs) -> Any:
    """The class, or an `Auto` class, of the task if there is one for this type of model, then the one in the adapter's
    config, then the one in the base's, then the causal language model; None if there is none of them."""
    import transformers

    # A task that PEFT does not know is reported by a rule (LP112); most adapters are of causal language models.
    task = AUTO.get(trained.task, AUTO["CAUSAL_LM"]) if trained.task else ()
    for name in (*task, *_named(config, trained), *AUTO["CAUSAL_LM"]):
        cls = getattr(transformers, name)
        if not name.startswith("Auto") or type(config) in cls._model_mapping:
            return cls
    return None


def _named(config: Any, trained: TrainedAs) -> Iterator[str]:
    """The classes that the adapter's and the base's configs name, as far as they are for the base's type of model."""
    import transformers

    for name in (trained.model_class, *(config.architectures or ())):
        cls = getattr(transformers, name, None) if name else None
        if getattr(cls, "config_class", None) is type(config):
            yield str(name)
