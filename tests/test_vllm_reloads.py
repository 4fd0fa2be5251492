"""Adapters that vLLM reads again, evicts, or fails to put into a slot: which load is in which slot, and since when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, SharedEngine, call, save_adapter
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

from lora_probe.ledger import headline
from lora_probe.recording.rows import NOT_IN_ITS_SLOT
from lora_probe.rules import diagnose

pytestmark = pytest.mark.engine


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_loader(monkeypatch)


@pytest.fixture(scope="module")
def tensors(adapter: Path) -> Tensors:
    return tensors_of(adapter)


def test_a_push_that_does_not_remove_the_old_weights_runs_with_them(
    engine: SharedEngine, tensors: Tensors, tmp_path: Path
) -> None:
    """vLLM registers the new weights, and leaves those in the slot: the id is active already."""
    number, answers = next(engine.numbers), []

    def work() -> None:
        for step in range(2):
            weights = {name: tensor * (1 + step) for name, tensor in tensors.items()}
            past_the_loader(engine, number, weights, remove=False)
            answers.append(ask(engine, number))

    trace = recorded(engine, tmp_path / "run", work)
    engine.llm.llm_engine.remove_lora(number)
    (_, first), (load, second) = trace.loads
    assert headline(first) == WHOLE
    assert answers[0] == answers[1]
    assert (load.generation, load.slot) == (1, 0)
    assert second.count("wrong") == MODULES
    (message,) = {row.stations["placed"].message for row in second.rows}
    assert message.endswith(
        "differs from the pushed tensors by 0.5 relative, seen in a slot that vLLM did not fill again"
    )
    assert {row.stations["agrees"].value for row in second.rows} == {"wrong"}


def test_load_inplace_on_every_step_is_one_load(
    engine: SharedEngine, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM keeps the flag of the request, and reloads in every step. The hint cures it."""
    from vllm.lora.request import LoRARequest

    tokens, number = 14, next(engine.numbers)
    inplace = LoRARequest("healthy", number, str(adapter), load_inplace=True)
    trace = recorded(engine, tmp_path / "run", lambda: generate(engine, inplace, tokens) and None)
    ((load, ledger),) = trace.loads
    assert (load.generation, load.reloads) == (0, tokens - 1)
    assert headline(ledger) == WHOLE
    (diagnostic,) = [diagnostic for diagnostic in diagnose(ledger) if diagnostic.code == "LP506"]
    assert f"{tokens - 1} more times" in diagnostic.message
    seen = stages(trace)
    assert [seen.count(stage) for stage in ("activate", "register", "evict", "unload")] == [1, 1, 0, 0]
    assert seen.count("fold") == MODULES
    assert set(trace.rows.load.tolist()) == {load.load}
    engine.llm.llm_engine.remove_lora(number)
    _, out, _ = call("show", tmp_path / "run", capsys=capsys)
    assert out.count("LP506 reloaded-unchanged") == 1
    assert f"the unchanged adapter was read at least {tokens - 1} more times" in out

    plain = LoRARequest("healthy", number, str(adapter))

    def cured() -> None:
        push(engine, inplace)
        generate(engine, plain, tokens)

    ((load, ledger),) = recorded(engine, tmp_path / "cured", cured).loads
    assert load.reloads == 0
    assert diagnose(ledger) == []
    engine.llm.llm_engine.remove_lora(number)


def test_an_adapter_that_is_evicted_from_the_cache_is_the_same_load_again(
    engine: SharedEngine, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    other = save_adapter(tmp_path / "other", llama, seed=5)
    numbers = [next(engine.numbers), next(engine.numbers)]
    requests = [
        LoRARequest(path.name, number, str(path)) for path, number in zip((adapter, other), numbers, strict=True)
    ]

    def work() -> None:
        for request in requests * 2:
            generate(engine, request)

    trace = recorded(engine, tmp_path / "run", work)
    for number in numbers:
        engine.llm.llm_engine.remove_lora(number)
    assert [(load.name, load.generation, load.reloads) for load, _ in trace.loads] == [
        ("healthy", 0, 0),
        ("other", 0, 0),
    ]
    assert [headline(ledger) for _, ledger in trace.loads] == [WHOLE] * 2
    assert sum("again, unchanged" in event.text for event in trace.events) == 2
    counts = [stages(trace).count(stage) for stage in ("activate", "evict", "register", "fold")]
    assert counts == [4, 3, 2, 2 * MODULES]


def test_a_slot_that_vllm_failed_to_fill_is_known(
    engine: SharedEngine, adapter: Path, tmp_path: Path, replaced: None, tensors: Tensors
) -> None:
    """The first attempt raises; the second one does not, and requests are served from what is in the slot."""
    import torch

    numbers = [next(engine.numbers), next(engine.numbers)]
    name = "model.layers.0.self_attn.o_proj"
    stored_as = f"base_model.model.{name}"
    bad = {key: tensor * 2 for key, tensor in tensors.items() if "v_proj" not in key}
    bad |= {f"{stored_as}.lora_A.weight": torch.randn(8, 128), f"{stored_as}.lora_B.weight": torch.randn(4096, 8)}
    config = CONFIG | {"target_modules": ["q_proj", "k_proj", "o_proj"]}

    def work() -> None:
        push(engine, tensor_request("good", numbers[0], tensors))
        ask(engine, numbers[0], "good")
        request = tensor_request("bad", numbers[1], bad, config)
        with pytest.raises(RuntimeError, match="size"):
            push(engine, request)
        push(engine, request)
        ask(engine, numbers[1], "bad")

    trace = recorded(engine, tmp_path / "run", work)
    slots = list(manager_of(engine).lora_index_to_id)
    for number in numbers:
        engine.llm.llm_engine.remove_lora(number)
    (_, good), (load, ledger) = trace.loads
    assert headline(good) == WHOLE
    assert load.refused
    assert load.slot == slots.index(numbers[1])
    placed = {row.module: row.stations["placed"] for row in ledger.rows}
    assert placed["model.layers.0.self_attn.q_proj"].value == "ok"
    assert (placed[name].value, placed[name].code) == ("absent", "LP505")
    # The layers behind it hold what the former adapter left there.
    stale = placed[f"model.layers.{LAYERS - 1}.self_attn.q_proj"]
    assert (stale.value, stale.code) == ("wrong", "LP504")
    assert stale.message.endswith("differs from the pushed tensors by 0.5 relative, seen after vLLM failed to fill it")
    (left,) = [event for event in trace.events if event.stage == "stale"]
    assert left.text.endswith(f"weights of an earlier adapter, which vLLM did not reset: layers 1-{LAYERS - 1} v_proj")
    # Its rows are not those of the adapter, and the request is named.
    assert trace.rows.load.tolist().count(NOT_IN_ITS_SLOT) == len(IDS) + 2
    (finding,) = trace.request_findings
    assert (finding.load, finding.code, finding.rows) == (load.load, "LP606", len(IDS) + 2)


def test_removing_all_adapters_is_an_eviction_and_dummies_are_no_loads(
    engine: SharedEngine, adapter: Path, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    # The dummies of a dummy run have the ids 1 to max_loras.
    request = LoRARequest("healthy", 1, str(adapter))

    def dummy_run(worker: Any) -> None:
        import numpy as np

        runner = worker.model_runner
        counts = np.array([4], np.int32)
        with runner.maybe_dummy_run_with_lora(runner.lora_config, counts, counts, num_active_loras=1):
            pass

    def work() -> None:
        generate(engine, request)
        engine.llm.collective_rpc(lambda worker: worker.model_runner.lora_manager.remove_all_adapters())
        engine.llm.collective_rpc(dummy_run)
        generate(engine, request)

    trace = recorded(engine, tmp_path / "run", work)
    engine.llm.llm_engine.remove_lora(1)
    ((load, ledger),) = trace.loads
    assert (load.name, headline(ledger)) == ("healthy", WHOLE)
    (evicted,) = [event.text for event in trace.events if event.stage == "evict"]
    assert evicted == "healthy removed from slot 0 with all adapters"
    assert stages(trace).count("activate") == 2
    assert set(trace.rows.load.tolist()) == {load.load}
