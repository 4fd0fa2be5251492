"""The cost of checking a merge: relative to reading both checkpoints, and to what else one would do.

Both models have the shapes of a 1.5B model in bfloat16, 3.1 GB in shards. Files are in the page cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from merged_pair import ADAPTED, save_pair
from processes import PROBE, Peer, Stopwatch, of_json, peer, reading

pytestmark = pytest.mark.timeout(0)


def test_weights_only(
    stopwatch: Stopwatch, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    base, adapter, merged = save_pair(tmp_path_factory.mktemp("pair"))
    command = (PROBE, "parity", adapter, "--model", base, "--merged", merged, "--weights-only", "--format", "json")
    words = ("check", "--base", base, "--adapter", adapter, "--merged", merged, "--json", "--quiet")
    peers = peer(request.config.option.peers, "deltalint", *words)
    if peers:
        by_hand = (sys.executable, Path(__file__).with_name("by_hand.py"), base, adapter, merged)
        peers.append(Peer("merge_and_unload and compare", by_hand))

    def check(printed: str) -> None:
        report = of_json(printed)
        assert report["verdict"] == "verified"
        assert len(report["modules"]) == ADAPTED
        assert all(module["bit_exact"] for module in report["modules"])

    limit = reading("read", "read both checkpoints", base, merged)
    stopwatch.against("parity --weights-only, 2 x 3.1 GB", command, limit, check, most=1.3, peers=peers)
