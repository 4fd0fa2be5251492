"""The ledger that each engine will come to, predicted from files.

In: a `Case`, which `case_of` makes. Out: a `Prediction` with one ledger for each engine. What one engine does with an
adapter is in a file of its own (`peft`, `vllm`), a `Predictor` in the entry-point group `lora_probe.predictors`.
"""

from __future__ import annotations

from lora_probe.prediction.cases import case_of
from lora_probe.prediction.ledgers import Prediction, predict
from lora_probe.prediction.predictor import Predictor, predictors

__all__ = [
    "Prediction",
    "Predictor",
    "case_of",
    "predict",
    "predictors",
]
