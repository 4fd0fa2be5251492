"""The ledger that each engine will come to, predicted from files.

In: a `Subject`. Out: a `Prediction` with one ledger for each engine.
"""

from __future__ import annotations

from lora_probe.prediction.ledgers import Prediction, predict

__all__ = [
    "Prediction",
    "predict",
]
