"""The record of one load, with numpy alone: the findings of `applied` and `agrees`, and the sampled rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_probe import open_trace
from lora_probe.adapter import Adapter, open_adapter
from lora_probe.engines.load_record import ENOUGH_ROWS, LoadRecord
from lora_probe.engines.sampler import SAMPLED, Sampler
from lora_probe.ledger import OK, Finding, Ledger, Station
from lora_probe.names import name_modules
from lora_probe.precision import agrees
from lora_probe.recording import DECODE, PREFILL, SCHEMA, Floats, Load, Process, Trace, TraceWriter
from lora_probe.rules import diagnose
from lora_probe.rules.lp5_loading import no_lora_layer
from lora_probe.rules.stored import expect

INPUTS, OUTPUTS, RANK, SCALING = 32, 24, 4, 2.0
MODULES = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
Q, K, V = ((module, "weight", None) for module in MODULES)
ROWS = 6


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """q and k in the file; the config targets v as well."""
    folder = tmp_path_factory.mktemp("adapter")
    numbers = np.random.default_rng(0)
    tensors = {}
    for module in MODULES[:2]:
        for half, shape in (("A", (RANK, INPUTS)), ("B", (OUTPUTS, RANK))):
            values = numbers.normal(size=shape).astype(np.float32)
            tensors[f"base_model.model.{module}.lora_{half}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALING * RANK, "base_model_name_or_path": "base"}
    targets = [module.rpartition(".")[2] for module in MODULES]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    return open_adapter(folder)


class Recording:
    """A load that is recorded, and what a reader finds of it."""

    def __init__(self, folder: Path, adapter: Adapter, dtype: str) -> None:
        self.folder, self.adapter = folder, adapter
        self.writer = TraceWriter(folder / "peft", Process(SCHEMA, "engine", "peft", 0, 1, {}))
        shapes = dict.fromkeys(MODULES, (OUTPUTS, INPUTS))
        load = Load(0, "a", str(adapter.path), adapter.digest())
        self.record = LoadRecord(self.writer, load, adapter, expect(adapter, shapes), dtype)
        self.record.announce({})
        for station in ("read", "placed"):
            self.record.station(station, {Q: OK, K: OK})

    def x(self, rows: int = ROWS, seed: int = 1) -> Floats:
        return np.random.default_rng(seed).normal(size=(rows, INPUTS)).astype(np.float32)

    def pair(self, key: Any = Q) -> tuple[Floats, Floats]:
        entry = self.adapter.by_key()[key]
        assert entry.a is not None
        assert entry.b is not None
        return self.adapter.values(entry.a), self.adapter.values(entry.b)

    def sample(self, key: Any, x: Floats, change: Callable[[Floats], Floats] = lambda delta: delta) -> None:
        """Rows whose contribution is the file's, in float64 and rounded once, and then changed."""
        a, b = self.pair(key)
        exact = SCALING * (x.astype(np.float64) @ a.T) @ b.T
        self.record.sample(key, x, change(exact.astype(np.float32)), a, b, SCALING)

    def healthy(self, rows: int = ROWS) -> None:
        self.record.ran(rows, (Q, K), rows)
        for key in (Q, K):
            self.sample(key, self.x(rows))

    def finish(self, **why: Callable[[Any], str | None]) -> None:
        self.record.finish(**({"unmeasured": lambda _: None} | why))
        self.record.finish_requests()

    @property
    def trace(self) -> Trace:
        return open_trace(self.folder)

    @property
    def ledger(self) -> Ledger:
        ((_, ledger),) = self.trace.loads
        return ledger

    def finding(self, key: Any, station: Station) -> Finding:
        (row,) = [row for row in self.ledger.rows if row.key == key]
        return row.stations[station]

    def events(self, kind: str) -> list[dict[str, Any]]:
        lines = (self.folder / "peft" / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == kind]

    def lines(self, station: str) -> int:
        return sum(event["station"] == station for event in self.events("station"))


@pytest.fixture(params=["float32"])
def load(tmp_path: Path, adapter: Adapter, request: pytest.FixtureRequest) -> Iterator[Recording]:
    recording = Recording(tmp_path, adapter, request.param)
    yield recording
    recording.writer.close()


bfloat16 = pytest.mark.parametrize("load", ["bfloat16"], indirect=True)


def test_a_healthy_load(load: Recording) -> None:
    load.healthy()
    load.finish()
    assert [row.fate for row in load.ledger.rows if row.key != V] == ["took effect"] * 2
    (agree,) = [event for event in open_trace(load.folder).events if event.stage == "agree"]
    assert agree.facts["tolerance"] == agrees("float32")
    assert set(agree.facts["errors"]) == set(MODULES[:2])
    assert max(error for error, _, _ in agree.facts["errors"].values()) < agrees("float32") / 10
    assert [count for _, _, count in agree.facts["errors"].values()] == [ROWS] * 2


def test_a_module_without_a_pair_is_absent_at_every_station(load: Recording) -> None:
    load.healthy()
    load.record.ran(1, (V,), 1)
    load.finish()
    (row,) = [row for row in load.ledger.rows if row.key == V]
    assert {finding.value for finding in row.stations.values()} == {"absent"}
    assert row.stations["stored"].code == "LP204"


def test_a_load_is_announced_with_what_the_file_holds(load: Recording) -> None:
    records = {record["module"]: record for record in load.events("module")}
    assert [records[module].get("stored_as") for module in MODULES] == [*MODULES[:2], None]
    assert [records[module].get("rank") for module in MODULES] == [RANK, RANK, None]
    assert [records[module].get("scaling") for module in MODULES] == [SCALING, SCALING, None]
    a, b = load.pair()
    values = np.linalg.svd(SCALING * b @ a, compute_uv=False)
    assert records[Q[0]]["norm"] == pytest.approx(np.linalg.norm(values), rel=1e-4)
    assert 1 < records[Q[0]]["effective_rank"] <= RANK
    assert records[V[0]].get("norm") is None
    assert records[V[0]].get("effective_rank") is None


def test_no_line_is_about_no_module(tmp_path: Path, adapter: Adapter) -> None:
    writer = TraceWriter(tmp_path / "peft", Process(SCHEMA, "engine", "peft", 0, 1, {}))
    rows = tuple(row for row in expect(adapter, dict.fromkeys(MODULES, (OUTPUTS, INPUTS))) if row.entry is not None)
    LoadRecord(writer, Load(0, "a", str(adapter.path), adapter.digest()), adapter, rows, "float32").announce({})
    writer.close()
    events = [json.loads(line) for line in (tmp_path / "peft" / "events.jsonl").read_text().splitlines()]
    assert [event["station"] for event in events if event["kind"] == "station"] == ["stored"]


# applied


def test_rows_that_asked_and_never_ran(load: Recording) -> None:
    load.record.ran(ROWS, (K,), ROWS)
    load.sample(K, load.x())
    load.finish()
    found = load.finding(Q, "applied")
    assert (found.value, found.code) == ("absent", "LP601")
    assert f"none of the {ROWS} rows" in found.message
    # Its journey ends there: nothing is said of what it would have written.
    assert load.finding(Q, "agrees") == Finding("absent")
    assert load.finding(K, "applied") == OK


def test_rows_that_ran_in_another_slot(load: Recording) -> None:
    load.record.ran(ROWS, (Q, K), 0)
    load.finish()
    assert load.finding(Q, "applied").code == "LP601"


@pytest.mark.parametrize("applied", [1, ROWS - 1, ROWS + 1])
def test_rows_that_were_missed(load: Recording, applied: int) -> None:
    load.healthy()
    load.record.ran(ROWS, (Q,), applied)
    load.record.ran(0, (K,), ROWS)
    load.finish()
    found = load.finding(Q, "applied")
    assert (found.value, found.code) == ("wrong", "LP603")
    assert f"{ROWS + applied} of {2 * ROWS} rows" in found.message
    assert load.finding(K, "applied") == OK


def test_rows_that_did_not_ask(load: Recording) -> None:
    """The adapter's own rows are right, so it took effect; the finding is about the requests that got it."""
    load.healthy()
    load.record.contaminated({"cmpl-1": 2})
    load.record.so_far()
    load.record.contaminated({"cmpl-1": 1, "cmpl-2": 4})
    load.record.contaminated({})
    load.finish()
    assert load.finding(Q, "applied") == load.finding(K, "applied") == OK
    (finding,) = load.trace.request_findings
    assert (finding.load, finding.code, finding.rows, finding.requests, finding.more) == (
        0,
        "LP602",
        7,
        ["cmpl-1", "cmpl-2"],
        0,
    )
    assert finding.message == ("7 rows of 2 requests that did not ask for `a` got its contribution: cmpl-1, cmpl-2")
    assert (load.record.contaminated_rows, load.record.stale_rows) == (7, 0)
    load.writer.close()
    assert load.trace.complete
    assert not load.trace.healthy


def test_contamination_is_reported_though_no_row_asked(load: Recording) -> None:
    """Rows of the base alone, in the slot of an adapter that nobody requested."""
    load.record.contaminated({"cmpl-1": 4})
    load.record.so_far()
    assert [finding.code for finding in load.trace.request_findings] == ["LP602"]


def test_ten_requests_are_named_and_the_others_counted(load: Recording) -> None:
    for number in range(13):
        load.record.not_in_its_slot({f"r{number}": 2})
        load.record.not_in_its_slot({"r0": 1})
    load.record.cached_with_other_weights({"r1": 64})
    load.finish()
    stale, cached = load.trace.request_findings
    assert (stale.code, stale.rows, stale.more) == ("LP606", 39, 3)
    assert stale.requests == [f"r{number}" for number in range(10)]
    assert stale.message.endswith("r8, r9 and 3 more")
    assert "39 rows of 13 requests for `a`" in stale.message
    assert (cached.code, cached.rows, cached.requests) == ("LP607", 64, ["r1"])
    assert "64 cached positions of 1 request for `a`" in cached.message
    assert load.record.stale_rows == 39


def test_totals_that_grow_are_not_written_with_every_step(load: Recording) -> None:
    for _ in range(10_000):
        load.record.contaminated({"cmpl-1": 1})
        load.record.report_if_due()
    assert len(load.events("requests")) < 100
    load.finish()
    assert [finding.rows for finding in load.trace.request_findings] == [10_000]


def test_a_load_is_reported_without_a_sampled_row(load: Recording) -> None:
    load.record.ran(1, (Q, K), 1)
    load.record.report_if_due()
    assert (load.finding(Q, "applied"), load.finding(Q, "agrees").code) == (OK, "LP500")


def test_what_is_wrong_is_reported_at_once(load: Recording) -> None:
    load.record.ran(1, (Q, K), 1)
    load.record.report_if_due()
    load.record.ran(2, (Q, K), 1)
    load.record.report_if_due()
    assert load.finding(Q, "applied").code == "LP603"


def test_no_request_asked(load: Recording) -> None:
    load.finish()
    for station in ("applied", "agrees"):
        found = load.finding(Q, station)
        assert (found.value, found.code, found.message) == ("unknown", "LP500", "no request used the adapter")


# agrees


@pytest.mark.parametrize("factor", [0.99, 1.01, 1 + 1e-4, 0.0, -1.0])
def test_a_kernel_that_differs(load: Recording, factor: float) -> None:
    load.healthy()
    load.sample(Q, load.x(seed=2), lambda delta: delta * np.float32(factor))
    load.finish()
    found = load.finding(Q, "agrees")
    assert (found.value, found.code) == ("wrong", "LP604")
    assert f"on {2 * ROWS} sampled rows" in found.message
    assert load.finding(K, "agrees") == OK


@pytest.mark.parametrize("seed", range(20))
def test_a_factor_of_all_rows_is_stated(load: Recording, seed: int) -> None:
    load.record.ran(ROWS, (Q, K), ROWS)
    load.sample(Q, load.x(seed=seed), lambda delta: delta * np.float32(2))
    load.sample(K, load.x(seed=seed), lambda delta: delta * np.linspace(1, 3, len(delta), dtype=np.float32)[:, None])
    load.finish()
    assert "the contribution is 2 times what it should be" in load.finding(Q, "agrees").message
    assert "differs by" in load.finding(K, "agrees").message


def test_the_error_is_that_of_all_rows_together(load: Recording) -> None:
    load.record.ran(2 * ROWS, (Q, K), 2 * ROWS)
    for _ in range(2):
        load.sample(Q, load.x(), lambda delta: delta * np.float32(1.01))
        load.sample(K, load.x())
    load.finish()
    (agree,) = [event for event in open_trace(load.folder).events if event.stage == "agree"]
    error, worst, count = agree.facts["errors"][Q[0]]
    assert error == pytest.approx(0.01, rel=1e-3)
    assert worst == pytest.approx(0.01, rel=1e-3)
    assert count == 2 * ROWS
    assert agree.text.endswith(f", {name_modules([Q[0]])}")


@bfloat16
def test_round_off_of_the_dtype_is_allowed(load: Recording) -> None:
    load.record.ran(2 * ROWS, (Q, K), 2 * ROWS)
    load.sample(Q, load.x(), lambda delta: delta * np.float32(1 + 2**-8))
    load.sample(K, load.x(), lambda delta: delta * np.float32(1.1))
    load.finish()
    assert (load.finding(Q, "agrees"), load.finding(K, "agrees").code) == (OK, "LP604")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite(load: Recording, value: float) -> None:
    def spoil(delta: Floats) -> Floats:
        delta[-1, -1] = value
        return delta

    load.healthy()
    load.sample(Q, load.x(), spoil)
    load.sample(Q, load.x())
    load.finish()
    found = load.finding(Q, "agrees")
    assert (found.value, found.code) == ("wrong", "LP605")
    assert load.finding(K, "agrees") == OK


def test_an_input_that_is_not_finite(load: Recording) -> None:
    load.healthy()
    x = load.x()
    x[0, 0] = np.inf
    a, b = load.pair()
    with np.errstate(invalid="ignore"):
        load.record.sample(Q, x, np.zeros((ROWS, OUTPUTS), np.float32), a, b, SCALING)
    load.finish()
    assert load.finding(Q, "agrees").code == "LP605"


def test_a_contribution_where_the_file_has_none(load: Recording) -> None:
    """Rows of zeros have no contribution, and something was written all the same: infinitely wrong."""
    zeros = np.zeros((ROWS, INPUTS), np.float32)
    load.record.ran(ROWS, (Q, K), ROWS)
    load.sample(Q, zeros)
    load.sample(K, zeros, lambda delta: delta + np.float32(1e-6))
    load.finish()
    assert (load.finding(Q, "agrees"), load.finding(K, "agrees").code) == (OK, "LP604")


def cancelled(load: Recording, rows: int) -> Floats:
    """Rows whose x·Aᵀ nearly cancels: round-off is a large share of what is left."""
    a, _ = load.pair()
    x = load.x(rows).astype(np.float64)
    return (x - x @ np.linalg.pinv(a) @ a + 1e-5 * x).astype(np.float32)


@pytest.mark.parametrize(("rows", "code"), [(ENOUGH_ROWS - 1, "LP500"), (ENOUGH_ROWS, "LP604")])
@bfloat16
def test_few_rows_that_cancel_are_not_judged(load: Recording, rows: int, code: str) -> None:
    load.record.ran(rows, (Q, K), rows)
    x = cancelled(load, rows)
    load.sample(Q, x, lambda delta: delta * np.float32(1.5))
    load.finish()
    assert load.finding(Q, "agrees").code == code


@bfloat16
def test_few_rows_are_judged_where_nothing_cancels(load: Recording) -> None:
    load.record.ran(1, (Q, K), 1)
    load.sample(Q, load.x(1), lambda delta: delta * np.float32(3))
    load.finish()
    assert load.finding(Q, "agrees").code == "LP604"


def test_a_module_of_which_no_row_was_sampled(load: Recording) -> None:
    load.record.ran(ROWS, (Q, K), ROWS)
    load.sample(K, load.x())
    load.finish()
    assert load.finding(Q, "applied") == OK
    assert load.finding(Q, "agrees").code == "LP500"


def test_what_is_not_measured_says_why(load: Recording) -> None:
    load.record.ran(ROWS, (K,), ROWS)
    load.sample(K, load.x(), lambda delta: delta * 2)
    load.finish(
        unmeasured=lambda key: "it is an embedding" if key == Q else None,
        unjudged=lambda key: "it runs as DoRA" if key == K else None,
    )
    assert [load.finding(Q, station).message for station in ("applied", "agrees")] == ["it is an embedding"] * 2
    assert load.finding(K, "applied") == OK
    assert (load.finding(K, "agrees").value, load.finding(K, "agrees").message) == ("unknown", "it runs as DoRA")


# What becomes of a load.


def test_a_journey_that_has_ended_is_not_judged_further(load: Recording) -> None:
    load.record.station("placed", {Q: no_lora_layer("PEFT", "why")})
    assert (load.record.ended(Q), load.record.ended(K), load.record.ended(V)) == (True, False, True)
    load.healthy()
    load.record.so_far()
    load.finish()
    assert (load.finding(Q, "placed").code, load.finding(Q, "applied")) == ("LP502", Finding("absent"))
    assert load.finding(K, "applied") == OK


def test_another_ranks_modules_are_left_to_it(load: Recording) -> None:
    load.record.leave_to_another_rank([Q])
    before = load.lines("applied")
    load.healthy()
    load.record.so_far()
    load.finish()
    assert load.record.ended(Q)
    assert load.finding(Q, "applied").code == "LP500"
    # One line for K: `finish` comes to the same finding, which is not written twice.
    assert load.lines("applied") == before + 1


def test_a_load_changes_through_its_record(load: Recording) -> None:
    assert load.record.number == 0
    load.record.activated(3, ["INFO ready"])
    load.record.refused("too large")
    ((written, ledger),) = open_trace(load.folder).loads
    assert written == load.record.load
    assert (written.slot, written.said, written.refused, written.message) == (3, ["INFO ready"], True, "too large")
    assert ledger.refused


def test_a_killed_process_leaves_what_was_shown_until_then(load: Recording) -> None:
    load.record.so_far()
    assert load.finding(Q, "applied").code == "LP500"
    load.record.ran(ROWS, (Q, K), ROWS)
    load.sample(Q, load.x())
    load.sample(K, load.x(ENOUGH_ROWS - 1))
    load.record.so_far()
    assert [load.finding(key, "applied") for key in (Q, K)] == [OK, OK]
    assert load.finding(Q, "agrees") == OK
    # Too few rows to say anything yet.
    assert load.finding(K, "agrees").code == "LP500"
    lines = load.lines("applied")
    load.record.ran(ROWS, (Q, K), ROWS)
    load.record.so_far()
    assert load.lines("applied") == lines
    load.record.ran(ROWS, (Q, K), 0)
    load.record.so_far()
    assert load.finding(Q, "applied").code == "LP603"
    assert load.record.has_run(Q)
    assert not load.record.has_run(V)


def test_a_load_without_a_sampled_row_has_run(load: Recording) -> None:
    """All of its rows were decode rows of requests that had enough samples."""
    load.record.ran(1, (Q, K), 1)
    load.record.report_if_due()
    assert [load.finding(key, "applied") for key in (Q, K)] == [OK, OK]
    lines = load.lines("applied")
    load.record.ran(1, (Q, K), 1)
    load.record.report_if_due()
    assert load.lines("applied") == lines


def test_unchanged_reloads_are_counted_in_few_lines(load: Recording) -> None:
    load.healthy()
    for _ in range(14):
        load.record.reloaded()
    ((written, ledger),) = open_trace(load.folder).loads
    assert written.reloads == 8
    load.finish()
    ((written, ledger),) = open_trace(load.folder).loads
    assert (written.reloads, ledger.reloads) == (14, 14)
    (diagnostic,) = [one for one in diagnose(ledger) if one.code == "LP506"]
    assert diagnostic.severity == "warning"
    assert "14 more times" in diagnostic.message
    assert "load_inplace" in diagnostic.hint


def test_one_more_load_by_hand_is_not_reported(load: Recording) -> None:
    load.healthy()
    load.record.reloaded()
    load.finish()
    ((_, ledger),) = open_trace(load.folder).loads
    assert "LP506" not in {diagnostic.code for diagnostic in diagnose(ledger)}


# The rows that are sampled.


def test_the_first_rows_of_each_request_and_phase() -> None:
    sampler = Sampler()
    assert sampler.pick(["a"] * 6, [PREFILL] * 6) == list(range(SAMPLED[PREFILL]))
    assert sampler.pick(["a"], [DECODE]) == [0]
    assert sampler.pick(["a"], [DECODE]) == [0]
    assert sampler.pick(["a"], [DECODE]) == []
    assert sampler.pick(["a"] * 2, [PREFILL] * 2) == []


def test_requests_of_one_batch_are_counted_apart() -> None:
    sampler = Sampler()
    requests = ["a", "b", "a", "b", "a", "b", "a", "b", "a", "b"]
    assert sampler.pick(requests, [PREFILL] * 10) == list(range(2 * SAMPLED[PREFILL]))
    assert sampler.pick(["a", "b", "c"], [DECODE, PREFILL, PREFILL]) == [0, 2]


def test_a_prompt_in_chunks_is_sampled_once() -> None:
    sampler = Sampler()
    assert [sampler.pick(["a"] * 3, [PREFILL] * 3) for _ in range(3)] == [[0, 1, 2], [0], []]


def test_a_server_that_runs_for_long_forgets_the_oldest() -> None:
    sampler = Sampler()
    sampler.pick(["first"] * 4, [PREFILL] * 4)
    for number in range(Sampler.REMEMBERED - 1):
        sampler.pick([str(number)], [PREFILL])
    assert sampler.pick(["first"], [PREFILL]) == []
    sampler.pick(["one more"], [PREFILL])
    assert sampler.pick(["first"], [PREFILL]) == [0]
    assert sampler.pick(["one more"] * 4, [PREFILL] * 4) == [0, 1, 2]


@bfloat16
@pytest.mark.parametrize(("delta", "shrink", "value"), [(1, 1, "ok"), (0, 1, "wrong"), (1, 1.05, "wrong")])
def test_both_halves_of_a_fully_sharded_module_count(load: Recording, delta: float, shrink: float, value: str) -> None:
    """B is small, so that an error of the contribution would vanish beside x·Aᵀ."""
    load.record.ran(2 * ROWS, (Q,), 2 * ROWS)
    x, a = load.x(), np.ones((RANK, INPUTS), np.float32)
    b = np.full((OUTPUTS, RANK), 1e-5, np.float32)
    of_all = x @ a.T
    load.record.sample_shrink(Q, x, of_all * np.float32(shrink), a)
    load.record.sample(Q, of_all, of_all @ b.T * np.float32(delta), np.eye(RANK, dtype=np.float32), b, 1)
    load.finish()
    assert load.finding(Q, "agrees").value == value


def test_experts_count_the_rows_that_were_routed_to_them(load: Recording) -> None:
    load.record.ran(2 * ROWS, (), 2 * ROWS)
    load.record.routed([Q, K], 0, 0)
    load.record.routed([Q], 3, 2)
    load.finish()
    assert load.finding(Q, "applied").code == "LP603"
    assert load.finding(K, "applied").value == "unknown"
    assert load.finding(K, "applied").message == "no token of a request with the adapter reached it"
