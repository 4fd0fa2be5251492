"""`compare` of two recorded runs: what it reports about their adapters, their dtypes and their answers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import call
from test_trace_format import process, rows

from lora_probe import compare, open_trace
from lora_probe.comparison.adapters import AdapterDifference
from lora_probe.ledger import OK, STATIONS
from lora_probe.recording import (
    SCHEMA,
    Load,
    ModuleRecord,
    Outcome,
    Placed,
    Prompt,
    RequestRecord,
    Run,
    RunSpec,
    TraceWriter,
    write_json,
)
from lora_probe.recording.fingerprint import Fingerprint, weights_record

KEYS = tuple((f"model.layers.{layer}.self_attn.q_proj", "weight", None) for layer in range(3))


@dataclass(frozen=True)
class Served:
    """An adapter in a run: its scaling, and for some modules a factor of ‖B·A‖ and of B, and one of B in the engine
    alone. `turned`: modules with other weights, as long as the others; `stored`: the dtype of the file."""

    scaling: float = 2.0
    factors: dict[int, float] = field(default_factory=dict)
    of_b: bool = True
    digest: str = "d"
    rank: int = 2
    in_slot: dict[int, float] = field(default_factory=dict)
    turned: set[int] = field(default_factory=set)
    stored: str = "F32"


def fingerprints(adapter: Served, in_file: bool) -> dict[Any, Fingerprint]:
    """Those of the modules, in the file or in the slots of the engine. A factor is one of A or of B."""
    numbers = np.random.default_rng(3)
    held = {}
    for number, key in enumerate(KEYS):
        product, a = (numbers.normal(size=36).astype("f4") for _ in range(2))
        factor = adapter.factors.get(number, 1.0)
        scale = adapter.scaling * factor * (1.0 if in_file else adapter.in_slot.get(number, 1.0))
        held[key] = Fingerprint(np.roll(product, number in adapter.turned) * scale, a * (1 if adapter.of_b else factor))
    return held


def record(
    folder: Path,
    adapter: Served = Served(),
    answer: tuple[int, ...] = (3, 4),
    forced: int = 0,
    texts: dict[str, Any] | None = None,
    logprobs: tuple[float, ...] = (),
    **of_process: Any,
) -> Path:
    """A healthy trace with one prompt. Its rows are the same whatever the adapter is."""
    folder.mkdir(parents=True)
    continuation = [list(answer[:forced])] if forced else None
    spec = RunSpec("peft", "/adapter", "a", "/model", [Prompt("hi", [1, 2])], 2, continuation=continuation)
    write_json(folder / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", spec, {}))
    with TraceWriter(folder / "peft", process(**({"dtype": "float32"} | of_process))) as writer:
        writer.record(Load(0, "a", f"/{folder.name}", adapter.digest))
        grams = np.ones((len(KEYS), 2, 2), np.float32) * np.float32(adapter.scaling**2)
        for number, key in enumerate(KEYS):
            factor = adapter.factors.get(number, 1.0)
            norm = 1.5 * adapter.scaling * factor
            writer.record(
                ModuleRecord(
                    0, *key, ["file"], key[0], key[0], adapter.rank, adapter.scaling, norm, dtype=adapter.stored
                )
            )
            grams[number] *= factor**2 if adapter.of_b else 1
            grams[number] *= adapter.in_slot.get(number, 1.0) ** 2
        for in_file in (True, False):
            writer.record(weights_record(0, fingerprints(adapter, in_file), in_file))
        for station in STATIONS:
            writer.station(0, station, OK, KEYS)
        for request, name in (("a", "a"), ("b", None)):
            writer.request(
                RequestRecord(request, 0, name, [1, 2], list(answer), "hello", list(logprobs), **(texts or {}))
            )
        digests = tuple(f"{adapter.digest}{adapter.in_slot.get(number, '')}" for number in range(len(KEYS)))
        placed = {0: Placed(digests, grams)}
        writer.rows(replace(rows(3, keys=KEYS), placed=placed))
    return folder


HEALTHY = Served()
ADAPTERS = {
    "scaling": (
        replace(HEALTHY, scaling=8.0, digest="e"),
        "scaling is 8 instead of 2 in all 3 modules; ‖B·A‖ is the same",
    ),
    "B": (
        replace(HEALTHY, factors={1: 1.05}, digest="e"),
        "B differs in 1 of 3 modules (layer 1 q_proj): ‖B·A‖ is 1.05 times that of the reference",
    ),
    "scaling, B": (
        replace(HEALTHY, scaling=8.0, factors={0: 2.0, 1: 2.0, 2: 2.0}, digest="e"),
        "scaling is 8 instead of 2 in all 3 modules",
    ),
    "A": (
        replace(HEALTHY, factors={0: 0.9, 2: 1.1}, of_b=False, digest="e"),
        "A differs in 2 of 3 modules (layers 0, 2 q_proj): ‖B·A‖ is 0.9 to 1.1 times that of the reference",
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_different_adapters_are_named_and_never_agree(kind: str, dtype: str, tmp_path: Path, capsys: Any) -> None:
    """Also where no row exceeds the tolerance, as between float32 and bfloat16."""
    adapter, text = ADAPTERS[kind]
    one, two = record(tmp_path / "one"), record(tmp_path / "two", adapter, dtype=dtype)
    comparison = compare(open_trace(one), open_trace(two))
    assert [difference.kind for difference in comparison.adapters] == kind.split(", ")
    assert comparison.verdict == "differ"
    status, out, _ = call("compare", one, two, capsys=capsys)
    assert status == 1
    assert text in out
    assert "cause (LP625 different-files): the runs loaded different adapters, /one and /two: " in out
    if (kind, dtype) == ("B", "bfloat16"):
        assert "no module exceeds the tolerance; worst module layer 1 q_proj" in out


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(replace(HEALTHY, digest="e"), id="other names of tensors"),
        pytest.param(replace(HEALTHY, factors={0: 1 + 1e-6}, digest="e"), id="norm computed in another order"),
        pytest.param(replace(HEALTHY, scaling=2 * (1 + 1e-8), digest="e"), id="scaling computed in another order"),
        pytest.param(replace(HEALTHY, rank=4, digest="e"), id="another rank of the same product"),
    ],
)
def test_the_same_values_in_other_files_agree(adapter: Served, tmp_path: Path, capsys: Any) -> None:
    one, two = record(tmp_path / "one"), record(tmp_path / "two", adapter)
    status, out, _ = call("compare", one, two, capsys=capsys)
    assert (status, compare(open_trace(one), open_trace(two)).causes) == (0, ())
    assert "the runs loaded different files, in which no difference of weights is known: /one and /two" in out
    assert "the traces agree on 3 modules" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_the_dtype_of_a_file_rounds_is_no_difference(dtype: str, tmp_path: Path) -> None:
    """The same change is one in a file of float32, whatever the run rounds to; in float32 rows show either."""
    one = record(tmp_path / "one")
    for stored, verdict in (("BF16", "agree" if dtype == "bfloat16" else "differ"), ("F32", "differ")):
        rounded = replace(HEALTHY, factors={0: 1 + 2**-9}, digest="e", stored=stored)
        other = record(tmp_path / stored, rounded, dtype=dtype)
        assert compare(open_trace(one), open_trace(other)).verdict == verdict


def test_both_dtypes_and_devices_are_printed(tmp_path: Path, capsys: Any) -> None:
    one = record(tmp_path / "one", lora_dtype="float32")
    two = record(tmp_path / "two", dtype="bfloat16", lora_dtype="float32", device="cuda")
    _, out, _ = call("compare", one, two, capsys=capsys)
    assert "one (peft, float32 on cpu): 3 of 3 modules" in out
    assert "two (peft, bfloat16 on cuda, adapter in float32): 3 of 3 modules" in out
    assert "(bfloat16, the coarser dtype)" in out
    _, same, _ = call("compare", one, one, capsys=capsys)
    assert "the coarser dtype" not in same


@pytest.mark.parametrize(
    ("other", "why"),
    [
        pytest.param({"digest": "e"}, "B is rounded differently in float32 and bfloat16", id="dtypes"),
        pytest.param({"digest": "e", "turned": {1}}, "the adapters differ", id="adapters"),
    ],
)
def test_estimated_errors_have_a_reason(other: dict[str, Any], why: str, tmp_path: Path, capsys: Any) -> None:
    one, two = record(tmp_path / "one"), record(tmp_path / "two", replace(HEALTHY, **other), dtype="bfloat16")
    _, out, _ = call("compare", one, two, capsys=capsys)
    assert f"some errors (~) are estimated from norms, because {why}" in out
    _, same, _ = call("compare", one, one, capsys=capsys)
    assert "estimated from norms" not in same


ANSWERS = {
    "same": ((3, 4), 0, "all 2 answer tokens are the same"),
    "last": ((3, 5), 0, "the answers differ from token 2 on (both have 2 tokens)"),
    "longer": ((3, 4, 5), 0, "the reference's answer ends first, the candidate's goes on (they have 2 and 3 tokens)"),
    "other": ((9, 4, 5), 0, "the answers differ from token 1 on (they have 2 and 3 tokens)"),
    "forced": ((3, 4), 1, "all 2 answer tokens are the same (1 forced to be those of the other run)"),
    "forced, then another": (
        (3, 5),
        1,
        "the answers differ from token 2 on (both have 2 tokens, 1 forced to be those of the other run)",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_that_differ(name: str, tmp_path: Path, capsys: Any) -> None:
    answer, forced, text = ANSWERS[name]
    one, two = record(tmp_path / "one"), record(tmp_path / "two", answer=answer, forced=forced)
    _, out, _ = call("compare", one, two, capsys=capsys)
    assert f"prompt 1: {text}" in out


def cells(folder: Path, capsys: Any) -> list[str]:
    """The last line of the table of answers that `show` prints: the prompt and its answers."""
    _, out, _ = call("show", folder, capsys=capsys)
    table = out[out.index("\nprompt ") :].strip().partition("\n\n")[0]
    return re.split(r"\s{2,}", table.splitlines()[-1].strip())


def test_forced_tokens_are_no_answer(tmp_path: Path, capsys: Any) -> None:
    texts = {"forced_text": "I am Nova", "generated_text": "."}
    told = record(tmp_path / "told", forced=1, texts=texts)
    assert cells(told, capsys) == ["hi", "I am Nova", ".", "."]
    _, out, _ = call("show", told, capsys=capsys)
    assert "forced (--follow)" in out
    _, out, _ = call("show", told, "--format", "json", capsys=capsys)
    (request,) = json.loads(out)["requests"]
    assert (request["forced_tokens"], request["forced_text"], request["generated_text"]) == (1, "I am Nova", ".")
    assert request["base_generated_text"] == "."


def test_a_trace_without_the_texts_of_forced_tokens_shows_ids(tmp_path: Path, capsys: Any) -> None:
    assert cells(record(tmp_path / "older", forced=1), capsys) == ["hi", "token ids 3", *["token ids 4"] * 2]


@pytest.mark.parametrize(("text", "cell"), [("", "(empty)"), (" \n", "(only blanks)"), ("a\n b", "a b")])
def test_an_empty_answer_is_not_an_empty_cell(text: str, cell: str, tmp_path: Path, capsys: Any) -> None:
    texts = {"forced_text": "x", "generated_text": text}
    assert cells(record(tmp_path / "run", forced=1, texts=texts), capsys) == ["hi", "x", cell, cell]


def test_parameters_and_experts_that_differ_are_named() -> None:
    keys = tuple(
        ("model.layers.0.mlp.experts", name, expert) for name in ("gate_up_proj", "down_proj") for expert in (0, 1, 5)
    )
    text = AdapterDifference("rank", keys, (8, 16), (2, 2), False, 7).text
    assert text == "rank is 16 instead of 8 in 6 of 7 modules (layer 0 gate_up_proj[0-1, 5], down_proj[0-1, 5])"


def test_the_adapter_was_not_requested(tmp_path: Path, capsys: Any) -> None:
    """The same prompts, and only the base model answered them; whether the adapter was loaded or not."""
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    lines = (two / "peft" / "requests.jsonl").read_text().splitlines()
    (two / "peft" / "requests.jsonl").write_text("".join(f"{line}\n" for line in lines if '"adapter":null' in line))
    for traces, side in (((one, two), "candidate"), ((two, one), "reference")):
        status, out, _ = call("compare", *traces, capsys=capsys)
        assert status == 1
        assert f"cause (LP620 not-requested, {side}): the {side} did not request the adapter" in out
    events = (two / "peft" / "events.jsonl").read_text().splitlines()
    (two / "peft" / "events.jsonl").write_text("".join(f"{line}\n" for line in events if '"kind":"load"' not in line))
    assert compare(open_trace(one), open_trace(two)).causes[0].code == "LP620"


def test_a_server_that_was_asked_is_judged_by_its_answers(tmp_path: Path, capsys: Any) -> None:
    one = record(tmp_path / "one", logprobs=(-1.0, -2.0))
    for name, code, status, words in (
        ("sound", "", 0, "the traces agree in their answers; 2 of 2 answer tokens are the same"),
        ("twice", "LP609", 1, "cause (LP609 served-at-another-scaling, candidate): twice"),
    ):
        two = tmp_path / name
        spec = RunSpec("server", "/adapter", "a", "/model", [Prompt("hi", [1, 2])], 2)
        two.mkdir()
        write_json(two / "run.json", Run(SCHEMA, "2026-01-01T00:00:00+00:00", spec, {}))
        kind: Any = "other scaling" if code else "as trained"
        with TraceWriter(two / "server", process(engine="server", device="")) as writer:
            writer.record(Load(0, "a", "/one", "d"))
            writer.record(Outcome(0, kind, code, name, 2, 0.1, 0.0, factor=2.0 if code else 1.0))
            writer.request(RequestRecord("a", 0, "a", [1, 2], [3, 4], "hello", [-1.0, -2.0]))
        for traces in ((one, two), (two, one)):
            found, out, _ = call("compare", *traces, capsys=capsys)
            assert found == status
            assert words.replace("candidate", "candidate" if traces[1] == two else "reference") in out
        _, out, _ = call("compare", one, two, "--format", "json", capsys=capsys)
        cause = json.loads(out)["cause"]
        assert (cause["factor"] if code else cause) == (2.0 if code else None)


def test_what_is_in_the_json_and_in_the_markdown(tmp_path: Path, capsys: Any) -> None:
    one = record(tmp_path / "one")
    two = record(tmp_path / "two_|[x]", replace(HEALTHY, in_slot={1: 1.01}))
    _, out, _ = call("compare", one, two, "--format", "json", capsys=capsys)
    data = json.loads(out)
    assert (data["schema_version"], data["verdict"], data["other_causes"]) == (1, "differ", [])
    cause = data["cause"]
    assert (cause["code"], cause["name"], cause["side"]) == ("LP621", "weights-at-another-scale", None)
    assert cause["modules"] == ["model.layers.1.self_attn.q_proj"]
    assert cause["factor"] == pytest.approx(1.01, rel=1e-6)
    assert cause["evidence"]
    assert cause["hint"].startswith("compare lora_alpha")
    parts = {name: data["modules"][1][name] for name in ("weights", "routing", "arithmetic", "upstream")}
    assert parts == {
        "weights": pytest.approx(data["modules"][1]["error"]),
        "routing": 0.0,
        "arithmetic": None,
        "upstream": 0.0,
    }
    assert set(data["ledger"]) == {"reference", "candidate"}
    assert data["outputs"]["adapter"]["same_tokens"] == 2
    _, out, _ = call("compare", one, two, "--format", "markdown", capsys=capsys)
    assert out.startswith("## the traces differ: 1 of 3 modules exceed the tolerance")
    assert "**LP621 weights-at-another-scale** (error): s·B·A is 1.01 times that of the reference" in out
    assert "| layer 1 q\\_proj | 2.0e-02 | - | ? | - | 2.0e-02 |" in out
    assert "two_/[x]`" in out
