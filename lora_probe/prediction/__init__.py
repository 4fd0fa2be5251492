"""The ledger of each engine, predicted from files.

In: a `Subject`, which `subject_of` makes. Out: a `Prediction` with one ledger for each engine. What one engine does
with an adapter is in a file of its own (`peft`, `vllm`): a `Predictor`, found by the entry-point group
`lora_probe.predictors`.
"""

from __future__ import annotations

from lora_probe.prediction.ledgers import Prediction, predict
from lora_probe.prediction.predictor import Predictor, predictors
from lora_probe.prediction.subjects import subject_of

__all__ = [
    "Prediction",
    "Predictor",
    "predict",
    "predictors",
    "subject_of",
]
