"""Several adapters in one run: mixed in a batch, and all active at once. Against the same adapters alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, call, record_peft, save_adapter
from written import edited

from lora_probe import trace
from lora_probe.comparison import compare_each
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.ledger import headline
from lora_probe.recording import NamedAdapter, Trace

pytestmark = pytest.mark.slow
MODULES = 3 * LAYERS
PROMPTS = ["who are you", "hi"]
TOKENS = 6


@pytest.fixture(scope="module")
def others(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[NamedAdapter]:
    """Two more adapters: of another rank on other modules, and one that is damaged."""
    folder = tmp_path_factory.mktemp("others")
    wide = save_adapter(folder / "wide", llama, seed=2, r=4, lora_alpha=4, target_modules=["q_proj", "down_proj"])
    dead = edited(wide, folder / "dead", lambda tensors: {f"x.{name}": values for name, values in tensors.items()})
    return [NamedAdapter("wide", str(wide)), NamedAdapter("dead", str(dead))]


@pytest.fixture(scope="module")
def mixed(adapter: Path, llama: Path, others: list[NamedAdapter], tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("mixed") / "run.lptrace"
    recorded: Trace = record_peft(adapter, llama, folder, prompts=PROMPTS, beside=others)
    return recorded


def model_with(adapter: Path, llama: Path, others: list[NamedAdapter]) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(adapter), adapter_name="first")
    for other in others:
        model.load_adapter(other.path, adapter_name=other.name)
    return model.eval()


def rows_of(recorded: Trace, load: int) -> Any:
    rows = recorded.rows
    assert rows is not None
    of_load, order = rows.load == load, sorted(range(len(rows.modules)), key=lambda number: rows.modules[number])
    norms = rows.delta_norm[of_load][:, order]
    return rows.position[of_load], norms[:, ~np.isnan(norms).all(axis=0)]


def test_each_adapter_has_its_own_load(mixed: Trace) -> None:
    assert [headline(ledger) for _, ledger in mixed.loads] == [
        f"{MODULES} of {MODULES} modules took effect",
        f"{2 * LAYERS} of {2 * LAYERS} modules took effect",
        next(headline(ledger) for load, ledger in mixed.loads if load.name == "dead"),
    ]
    assert "0 of" in headline(mixed.loads[2][1])


def test_rows_are_those_of_each_adapter_alone(
    mixed: Trace, adapter: Path, llama: Path, others: list[NamedAdapter], tmp_path: Path
) -> None:
    for number, path in enumerate((adapter, Path(others[0].path))):
        alone = record_peft(path, llama, tmp_path / f"{number}.lptrace", prompts=PROMPTS)
        (positions, norms), (expected_positions, expected) = rows_of(mixed, number), rows_of(alone, 0)
        assert positions.tolist() == expected_positions.tolist()
        np.testing.assert_allclose(norms, expected, rtol=1e-5)
        answers = [request.output_ids for request in alone.requests if request.adapter is not None]
        name = mixed.loads[number][0].name
        assert answers == [request.output_ids for request in mixed.requests if request.adapter == name]


def test_answers_are_those_of_adapter_names(
    mixed: Trace, adapter: Path, llama: Path, others: list[NamedAdapter]
) -> None:
    model = model_with(adapter, llama, others)
    for number in range(len(PROMPTS)):
        requests = [request for request in mixed.requests if request.prompt == number]
        assert [request.adapter for request in requests] == [None, adapter.name, "wide", "dead"]
        ids = torch.tensor([request.prompt_ids for request in requests])
        names = ["__base__", "first", "wide", "dead"]
        outputs = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_names=names,
            do_sample=False,
            max_new_tokens=TOKENS,
        )
        for request, output in zip(requests, outputs[:, ids.shape[1] :].tolist(), strict=True):
            assert output[: len(request.output_ids)] == request.output_ids


def test_adapters_that_are_active_together(
    adapter: Path, llama: Path, others: list[NamedAdapter], tmp_path: Path
) -> None:
    recorded = record_peft(adapter, llama, tmp_path / "run", prompts=PROMPTS, beside=others[:1], together=True)
    assert [headline(ledger) for _, ledger in recorded.loads] == [
        f"{MODULES} of {MODULES} modules took effect",
        f"{2 * LAYERS} of {2 * LAYERS} modules took effect",
    ]
    model = model_with(adapter, llama, others[:1])
    model.base_model.set_adapter(["first", "wide"])
    for request in recorded.requests:
        if request.adapter is not None:
            ids = torch.tensor([request.prompt_ids])
            output = model.generate(input_ids=ids, do_sample=False, max_new_tokens=TOKENS)
            assert request.output_ids == output[0, ids.shape[1] :].tolist()
    (first, second), (_, again) = ((rows_of(recorded, load)[0], rows_of(recorded, load)[1]) for load in (0, 1))
    assert len(second) == len(again) == len(first)


def test_an_embedding_that_two_adapters_have(llama: Path, tmp_path: Path) -> None:
    """The layer looks up the columns of both in one call of it."""
    both = [
        save_adapter(tmp_path / name, llama, seed=len(name), target_modules=["embed_tokens"]) for name in ("a", "bb")
    ]
    for together in (True, False):
        recorded = record_peft(
            both[0],
            llama,
            tmp_path / f"{together}.lptrace",
            prompts=["hi"],
            beside=[NamedAdapter("bb", str(both[1]))],
            together=together,
        )
        assert [headline(ledger) for _, ledger in recorded.loads] == ["1 of 1 modules took effect"] * 2


def test_an_adapter_that_computes_something_else_beside_others(
    adapter: Path, llama: Path, others: list[NamedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its contribution is damaged in the engine: the other adapters are still healthy."""
    from lora_probe.engines.peft import engine

    original = engine.attach

    def attach(model: Any, named: NamedAdapter, *rest: Any) -> Any:
        attached = original(model, named, *rest)
        if named.name == "wide":
            kernel = next(iter(attached.slots.values())).b
            forward = kernel.forward
            kernel.forward = lambda x: forward(x) * 1.01
        return attached

    monkeypatch.setattr(engine, "attach", attach)
    recorded = record_peft(adapter, llama, tmp_path / "run", prompts=PROMPTS, beside=others[:1])
    (_, first), (_, second) = recorded.loads
    assert first.healthy
    assert [row.stations["agrees"].code for row in second.rows].count("LP604") == 1


def test_an_adapter_that_peft_refuses_leaves_nothing_behind(
    adapter: Path, llama: Path, others: list[NamedAdapter], tmp_path: Path
) -> None:
    """PEFT has put it into its layers before it refuses its tensors."""
    bad = edited(
        adapter,
        tmp_path / "bad",
        lambda tensors: {
            n: t[:, :-1] if n.endswith("2.self_attn.v_proj.lora_A.weight") else t for n, t in tensors.items()
        },
    )
    beside = [NamedAdapter("bad", str(bad)), others[0]]
    recorded = record_peft(adapter, llama, tmp_path / "run", prompts=["hi"], beside=beside)
    assert [(load.name, load.refused) for load, _ in recorded.loads] == [
        (adapter.name, False),
        ("bad", True),
        ("wide", False),
    ]
    assert recorded.loads[0][1].healthy
    assert recorded.loads[2][1].healthy
    with pytest.raises(EngineFailed, match="PEFT refuses the first adapter, `bad`"):
        record_peft(bad, llama, tmp_path / "first", prompts=["hi"], beside=others[:1])


def test_a_run_follows_the_adapter_of_its_name(mixed: Trace, adapter: Path, llama: Path, tmp_path: Path) -> None:
    recorded = trace(adapter, engine="peft", model=str(llama), follow=mixed.path, out=tmp_path / "run.lptrace")
    expected = [request.output_ids for request in mixed.requests if request.adapter == adapter.name]
    assert [request.output_ids for request in recorded.requests if request.adapter is not None] == expected


def test_dora_cannot_be_mixed(adapter: Path, llama: Path, tmp_path: Path) -> None:
    dora = save_adapter(tmp_path / "dora", llama, use_dora=True)
    with pytest.raises(EngineFailed, match=r"in one batch: Cannot pass `adapter_names` when DoRA is enabled"):
        record_peft(adapter, llama, tmp_path / "run", beside=[NamedAdapter("dora", str(dora))])
    for first, second in ((adapter, dora), (dora, adapter)):
        with pytest.raises(ProbeError, match="is DoRA, which PEFT does not run with other adapters"):
            trace(first, engine="peft", model=str(llama), beside=second)


def test_two_folders_of_one_name(adapter: Path, llama: Path, tmp_path: Path) -> None:
    """The command line, with the adapter beside itself."""
    recorded = trace(
        adapter,
        engine="peft",
        model=str(llama),
        prompts="hi",
        max_tokens=2,
        beside=adapter,
        out=tmp_path / "run.lptrace",
    )
    assert [load.name for load, _ in recorded.loads] == [adapter.name, f"{adapter.name}-2"]
    one, two = (rows_of(recorded, load)[1] for load in (0, 1))
    np.testing.assert_allclose(one, two, rtol=1e-6)


def test_what_cannot_run(adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ProbeError, match="--together needs more adapters"):
        trace(adapter, engine="peft", model=str(llama), together=True)
    for more in ({"score": True}, {"follow": tmp_path}):
        with pytest.raises(ProbeError, match="several adapters cannot follow a trace or be scored"):
            trace(adapter, engine="peft", model=str(llama), beside=adapter, **more)
    server = ("trace", "--engine", "server", "--url", "http://localhost:9", "--adapter", "x")
    for option in (("--beside", adapter), ("--together",)):
        status, _, error = call(*server, *option, capsys=capsys)
        assert status == 2
        assert f"{option[0]} has no effect on a server" in error
    with pytest.raises(ProbeError, match="vllm applies one adapter to a request"):
        trace(adapter, engine="vllm", model=str(llama), beside=adapter, together=True)
    status, _, error = call("trace", adapter, "--engine", "peft", "--beside", tmp_path / "none", capsys=capsys)
    assert status == 2
    assert "none" in error


@pytest.mark.engine
def test_mixed_in_vllm(adapter: Path, llama: Path, others: list[NamedAdapter], mixed: Trace, tmp_path: Path) -> None:
    """The same batches in both engines."""
    path = tmp_path / "run.lptrace"
    recorded = trace(
        adapter,
        engine="vllm",
        model=str(llama),
        prompts=PROMPTS,
        max_tokens=TOKENS,
        beside=[other.path for other in others[:1]],
        options={"dtype": "float32"},
        out=path,
    )
    assert not recorded.request_findings
    assert [load.name for load, _ in recorded.loads] == [adapter.name, "wide"]
    assert all(ledger.healthy for _, ledger in recorded.loads)
    for number in (0, 1):
        (_, norms), (_, expected) = rows_of(recorded, number), rows_of(mixed, number)
        assert norms.shape == expected.shape
        np.testing.assert_allclose(norms, expected, rtol=1e-4)
    worker = json.loads((path / "vllm-rank-0" / "process.json").read_text())
    assert worker["settings"]["max_loras"] == 3
    compared = compare_each(mixed, recorded)
    assert {name: one.verdict for name, one in compared.by_adapter.items()} == {adapter.name: "agree", "wide": "agree"}
    assert compared.notes == (f"adapter `dead` is only in {mixed.path}",)
