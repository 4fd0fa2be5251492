"""Adapters that reach vLLM without a file, whole or half: one ledger for each content, with the tensors in place of the
file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, SharedEngine, call
from pushes import (
    CONFIG,
    IDS,
    MODULES,
    WHOLE,
    Tensors,
    ask,
    generate,
    manager_of,
    past_the_loader,
    push,
    recorded,
    replace_loader,
    stages,
    tensor_request,
    tensors_of,
)

from lora_probe.ledger import STATIONS, headline

pytestmark = pytest.mark.engine


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loader(monkeypatch)


@pytest.fixture(scope="module")
def tensors(adapter: Path) -> Tensors:
    return tensors_of(adapter)


def test_pushed_tensors_play_the_part_of_the_file(
    engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    number = next(engine.numbers)

    def work() -> None:
        push(engine, tensor_request("policy", number, tensors))
        ask(engine, number, "policy")

    trace = recorded(engine, tmp_path / "run", work)
    engine.llm.llm_engine.remove_lora(number)
    ((load, ledger),) = trace.loads
    assert headline(ledger) == WHOLE
    assert (load.name, load.path, load.engine_id, len(load.digest)) == ("policy", "pushed as tensors", number, 64)
    assert {row.stations[station].value for row in ledger.rows for station in STATIONS} == {"ok"}
    assert set(trace.rows.load.tolist()) == {load.load}
    assert next(event.text for event in trace.events if event.stage == "read") == "policy pushed as tensors"
    assert "from the pushed tensors" in next(event.text for event in trace.events if event.stage == "agree")


def test_a_replaced_loader_that_reads_a_file_makes_one_load(
    engine: SharedEngine, replaced: None, adapter: Path, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    number = next(engine.numbers)
    request = LoRARequest("healthy", number, str(adapter))
    trace = recorded(engine, tmp_path / "run", lambda: generate(engine, request) and None)
    engine.llm.llm_engine.remove_lora(number)
    ((load, ledger),) = trace.loads
    assert headline(ledger) == WHOLE
    assert (load.name, load.path) == ("healthy", str(adapter))


def test_three_pushes_in_place_are_three_generations(
    engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    number = next(engine.numbers)

    def work() -> None:
        for step in range(3):
            weights = {name: tensor * (1 + step) for name, tensor in tensors.items()}
            push(engine, tensor_request("policy", number, weights, load_inplace=True))
            ask(engine, number, "policy")

    trace = recorded(engine, tmp_path / "run", work)
    engine.llm.llm_engine.remove_lora(number)
    assert [(load.engine_id, load.generation, load.reloads) for load, _ in trace.loads] == [
        (number, generation, 0) for generation in range(3)
    ]
    assert [headline(ledger) for _, ledger in trace.loads] == [WHOLE] * 3
    assert len({load.digest for load, _ in trace.loads}) == 3
    assert [trace.rows.load.tolist().count(load.load) for load, _ in trace.loads] == [len(IDS) + 2] * 3
    digests = [placed.digests for placed in trace.rows.placed.values()]
    assert len(set(digests)) == 3


def test_three_pushes_under_new_ids_are_three_loads(
    engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    numbers = [next(engine.numbers) for _ in range(3)]

    def work() -> None:
        for step, number in enumerate(numbers):
            weights = {name: tensor * (1 + step) for name, tensor in tensors.items()}
            push(engine, tensor_request(f"step {step}", number, weights))
            ask(engine, number, f"step {step}")
            engine.llm.llm_engine.remove_lora(number)

    trace = recorded(engine, tmp_path / "run", work)
    assert [(load.name, load.engine_id, load.generation) for load, _ in trace.loads] == [
        (f"step {step}", number, 0) for step, number in enumerate(numbers)
    ]
    assert [headline(ledger) for _, ledger in trace.loads] == [WHOLE] * 3
    assert stages(trace).count("unload") == 3


def test_a_push_past_the_loader(engine: SharedEngine, tensors: Tensors, tmp_path: Path) -> None:
    number = next(engine.numbers)

    def work() -> None:
        for step in range(3):
            past_the_loader(engine, number, {name: tensor * (1 + step) for name, tensor in tensors.items()})
            ask(engine, number)

    trace = recorded(engine, tmp_path / "run", work)
    engine.llm.llm_engine.remove_lora(number)
    assert [(load.name, load.generation) for load, _ in trace.loads] == [(f"adapter {number}", n) for n in range(3)]
    assert [headline(ledger) for _, ledger in trace.loads] == [WHOLE] * 3


def test_a_model_that_no_loader_made(engine: SharedEngine, tensors: Tensors, tmp_path: Path) -> None:
    """Its parts are fused and scaled already, or not."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    number = next(engine.numbers)

    def add(worker: Any) -> None:
        manager = worker.model_runner.lora_manager._adapter_manager
        names = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors}
        halves = {
            name: [tensors[f"base_model.model.{name}.lora_{half}.weight"].clone() for half in "AB"] for name in names
        }
        weights = {name: LoRALayerWeights(name, 8, 16, *pair) for name, pair in halves.items()}
        lora = LoRAModel(number, 8, weights)
        manager._add_adapter(lora)
        manager.activate_adapter(number)

    def work() -> None:
        engine.llm.collective_rpc(add)
        ask(engine, number)

    trace = recorded(engine, tmp_path / "run", work)
    packed = manager_of(engine).get_adapter(number)

    def add_again(worker: Any) -> None:
        manager = worker.model_runner.lora_manager._adapter_manager
        manager.remove_adapter(number)
        manager._add_adapter(packed)
        manager.activate_adapter(number)

    def work_again() -> None:
        engine.llm.collective_rpc(add_again)
        ask(engine, number)

    again = recorded(engine, tmp_path / "again", work_again)
    engine.llm.llm_engine.remove_lora(number)
    for each in (trace, again):
        ((load, ledger),) = each.loads
        assert headline(ledger) == WHOLE
        assert load.path == "pushed as tensors"
    assert {round(module.scaling or 0, 6) for module in trace.modules.values()} == {2.0}
    assert {round(module.scaling or 0, 6) for module in again.modules.values()} == {1.0}


def test_a_push_of_half_the_modules_names_the_others(
    engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    number = next(engine.numbers)
    half = {name: tensor for name, tensor in tensors.items() if "v_proj" not in name}

    def work() -> None:
        push(engine, tensor_request("half", number, half))
        ask(engine, number, "half")

    trace = recorded(engine, tmp_path / "run", work)
    engine.llm.llm_engine.remove_lora(number)
    ((_, ledger),) = trace.loads
    assert headline(ledger) == (
        f"{MODULES - LAYERS} of {MODULES} modules took effect, {LAYERS} lost at stored: "
        f"layers 0-{LAYERS - 1} v_proj are not in the pushed tensors (LP204)"
    )


def test_layers_that_were_not_trained_are_not_missed(
    engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    """vLLM's PEFTHelper drops the field that says so."""
    number = next(engine.numbers)
    first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    config = CONFIG | {"layers_to_transform": [0], "target_modules": {"q_proj", "k_proj", "v_proj"}}

    def work() -> None:
        push(engine, tensor_request("first", number, first, config))
        ask(engine, number, "first")

    trace = recorded(engine, tmp_path / "run", work)
    engine.llm.llm_engine.remove_lora(number)
    assert headline(trace.loads[0][1]) == "3 of 3 modules took effect"


@pytest.mark.parametrize("keep", ["events", "norms", "shrink", "tensors"])
def test_a_push_under_wrong_names_is_lost_at_read(
    engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path, keep: str
) -> None:
    """None of its modules has a home: the recording goes on, and another adapter is recorded beside it."""
    numbers = [next(engine.numbers), next(engine.numbers)]
    wrong = {name.replace("base_model.model.model.", ""): tensor for name, tensor in tensors.items()}

    def work() -> None:
        push(engine, tensor_request("wrong", numbers[0], wrong))
        ask(engine, numbers[0], "wrong")
        push(engine, tensor_request("right", numbers[1], tensors))
        ask(engine, numbers[1], "right")
        ask(engine, numbers[1], "right")

    trace = recorded(engine, tmp_path / "run", work, keep)
    for number in numbers:
        engine.llm.llm_engine.remove_lora(number)
    (_, wrong_ledger), (_, right_ledger) = trace.loads
    assert headline(wrong_ledger) == (
        f"0 of {MODULES} modules took effect, {MODULES} lost at read: "
        "the names in the pushed tensors begin with `layers`, the model's with `model.layers` (LP501)"
    )
    assert right_ledger.healthy is (keep != "events")
    assert "probe" not in stages(trace)


def test_a_refused_push_is_refused(engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path) -> None:
    number = next(engine.numbers)
    odd = {name.replace("lora_A.weight", "lora_C.weight"): tensor for name, tensor in tensors.items()}

    def work() -> None:
        with pytest.raises(ValueError, match="unsupported LoRA weight"):
            push(engine, tensor_request("odd", number, odd))

    ((load, ledger),) = recorded(engine, tmp_path / "run", work).loads
    assert load.refused
    assert "unsupported LoRA weight" in headline(ledger)


def test_a_push_that_is_refused_before_it_arrives_is_in_the_timeline(
    engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    """The replaced loader compares the config with vLLM's flags before it touches the tensors."""
    number = next(engine.numbers)

    def work() -> None:
        with pytest.raises(ValueError, match="max_lora_rank"):
            push(engine, tensor_request("large", number, tensors, CONFIG | {"r": 64}))

    trace = recorded(engine, tmp_path / "run", work)
    assert trace.loads == ()
    (refused,) = [event.text for event in trace.events if event.stage == "refused"]
    assert refused.startswith("large, before vLLM read it: LoRA rank 64 is greater than max_lora_rank 16.")


def test_an_empty_push_is_refused(engine: SharedEngine, replaced: None, tmp_path: Path) -> None:
    """vLLM fails at it with a StopIteration."""
    number = next(engine.numbers)

    def work() -> None:
        with pytest.raises((StopIteration, RuntimeError)):
            push(engine, tensor_request("empty", number, {}))

    ((load, ledger),) = recorded(engine, tmp_path / "run", work).loads
    assert load.refused
    assert ledger.count("lost") == MODULES


@pytest.mark.parametrize("limit", [2**30, 1000])
def test_a_large_push_is_copied_within_a_limit(
    engine: SharedEngine,
    replaced: None,
    tensors: Tensors,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
) -> None:
    """The framework overwrites its tensors afterwards."""
    from lora_probe.adapter import pushed
    from lora_probe_vllm import loads

    monkeypatch.setattr(loads, "CACHED_PARAMETERS", 0)
    monkeypatch.setattr(pushed, "MOST_COPIED", limit)
    number = next(engine.numbers)

    def work() -> None:
        request = tensor_request("large", number, tensors)
        push(engine, request)
        for tensor in request.lora_tensors.values():
            tensor.zero_()
        ask(engine, number, "large")

    ((_, ledger),) = recorded(engine, tmp_path / "run", work).loads
    engine.llm.llm_engine.remove_lora(number)
    assert headline(ledger) == WHOLE
    values = {row.stations[station].value for row in ledger.rows for station in ("placed", "agrees")}
    assert values == {"ok" if limit > 1000 else "unknown"}
    if limit == 1000:
        (message,) = {row.stations[station].message for row in ledger.rows for station in ("placed", "agrees")}
        assert "no copy of the pushed tensors was kept" in message
        assert "the limit for a copy is 1,000" in message


def test_a_trace_of_a_pushed_adapter_is_shown(
    engine: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = next(engine.numbers)

    def work() -> None:
        push(engine, tensor_request("policy", number, tensors))
        ask(engine, number, "policy")

    recorded(engine, tmp_path / "run", work)
    engine.llm.llm_engine.remove_lora(number)
    status, out, _ = call("show", tmp_path / "run", capsys=capsys)
    assert status == 0
    assert "pushed as tensors" in out
    assert WHOLE in out
