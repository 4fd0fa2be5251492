"""Writes down which ledgers the failures come to: `python tests/record_outcomes.py`.

In: the failures, and the recorded answers of the engines. Out: tests/data/outcomes.json, as `check` predicts it today.
`test_predictions.py` holds that against what both engines do with each failure, and the fast tests against this file.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from failures import FAILURES
from record_views import write_json
from test_predictions import OUTCOMES, Corpus, summary
from written import write_adapter, write_base


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        base = write_base(Path(name) / "llama")
        corpus = Corpus(Path(name), write_adapter(Path(name) / "healthy", base), base, write_adapter)
        reports = {failure: corpus.report(failure) for failure in FAILURES}
        told = {name: {e: summary(ledger) for e, ledger in report.ledgers.items()} for name, report in reports.items()}
        write_json(OUTCOMES, told)


if __name__ == "__main__":
    main()
