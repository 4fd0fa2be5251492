"""The report on an adapter whose files cannot be read.

In: its folder, and the error. Out: a `Report` with that error as its only finding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lora_probe.adapter import CONFIG, open_config
from lora_probe.adapter.config import base_named_in
from lora_probe.adapter.file_names import LOADED
from lora_probe.adapter.folder import weights_in
from lora_probe.checking.report import Report
from lora_probe.errors import ForeignWeights, MissingWeights, NotLora, UnreadableFile
from lora_probe.files.regexes import EndlessPattern
from lora_probe.ledger import Ledger
from lora_probe.prediction import predictors
from lora_probe.rules import all_rules
from lora_probe.rules.diagnostics import under
from lora_probe.rules.lp1_config import config_unreadable, not_lora
from lora_probe.rules.lp2_files import weights_not_found, weights_unreadable


def holds_weights(folder: Path) -> bool:
    return bool(weights_in(folder))


def unreadable(
    folder: Path, notes: tuple[str, ...], model: str | None, error: UnreadableFile, selected: frozenset[str]
) -> Report:
    """The report on files that no engine loads: the error is the only finding. `model` is the base model that the user
    passed, by default the one that the config names."""
    path = _present(folder, (CONFIG, *weights_in(folder)))
    if isinstance(error, ForeignWeights):
        path, judged = _present(folder, LOADED), not_lora(error.message)
    elif isinstance(error, NotLora):
        judged = not_lora(error.message)
    elif isinstance(error, MissingWeights):
        judged = weights_not_found(error.message)
    elif isinstance(error, EndlessPattern):
        judged = config_unreadable(error.message)
    else:
        try:
            open_config(folder / CONFIG)
        except UnreadableFile:
            judged = config_unreadable(error.message)
        else:
            path, judged = _present(folder, LOADED), weights_unreadable(error.message)
    rule = all_rules()[judged.code]
    engines = tuple(name for name, predictor in predictors().items() if error.key not in predictor.ignored_fields)
    diagnostic = under(rule, error.message, (), engines, str(path), error.line, hint=error.hint)
    # PEFT supports other methods than LoRA, so it may load this adapter; that is not checked.
    refusing = () if isinstance(error, NotLora) else engines
    ledgers = {name: Ledger(name, (), True, error.message, judged.code, predicted=True) for name in refusing}
    base = model or base_named_in(folder / CONFIG)
    return Report(folder, base, ledgers, (diagnostic,) if rule.code in selected else (), notes=notes)


def _present(folder: Path, names: Sequence[str]) -> Path:
    """The first of `names` that is in the folder; the folder itself if there is none."""
    return next((folder / name for name in names if os.path.lexists(folder / name)), folder)
