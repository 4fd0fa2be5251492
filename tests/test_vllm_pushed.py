"""Adapters that reach vLLM without a file, again and again, or half: one ledger for each content. All tests share one
engine.

`_load_adapter` of the subclass that vLLM uses is replaced as reinforcement-learning frameworks do it, which hides the
probe's patch on the base class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, SharedEngine, call, save_adapter, start_engine

from lora_probe import open_trace
from lora_probe.ledger import STATIONS, headline
from lora_probe.rules import diagnose

pytestmark = pytest.mark.engine
MODULES = 3 * LAYERS
WHOLE = f"{MODULES} of {MODULES} modules took effect"
IDS = [40, 41, 42, 43]
CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj", "v_proj"], "bias": "none"}
Tensors = dict[str, Any]


@pytest.fixture(scope="module")
def pushing(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedEngine]:
    from lora_probe_vllm.patching import disarm

    yield start_engine(llama, tmp_path_factory.mktemp("engine") / "first.lptrace")
    disarm()


def tensor_request(name: str, number: int, tensors: Tensors, config: dict[str, Any] = CONFIG, **flags: Any) -> Any:
    """As in verl: a LoRARequest with the tensors in it."""
    from vllm.lora.request import LoRARequest

    class TensorLoRARequest(LoRARequest):
        peft_config: dict[str, Any] = {}
        lora_tensors: dict[str, Any] = {}

    clones = {key: tensor.clone() for key, tensor in tensors.items()}
    request = TensorLoRARequest(name, number, "simple_lora_path", **flags)
    request.peft_config, request.lora_tensors = config, clones
    return request


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """`_load_adapter` of the subclass, replaced as verl does it."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    def load_adapter(self: Any, request: Any) -> Any:
        manager = self._adapter_manager
        if hasattr(request, "lora_tensors"):
            helper = PEFTHelper.from_dict(request.peft_config)
            helper.validate_legal(self.lora_config)
            return LoRAModel.from_lora_tensors(
                lora_model_id=request.lora_int_id,
                tensors=request.lora_tensors,
                peft_helper=helper,
                device="cpu",
                dtype=self.lora_config.lora_dtype,
            )
        helper = PEFTHelper.from_local_dir(request.lora_path, self.max_position_embeddings)
        names = {part for parts in manager.packed_modules_mapping.values() for part in parts}
        return self._lora_model_cls.from_local_checkpoint(
            request.lora_path,
            names,
            peft_helper=helper,
            lora_model_id=request.lora_int_id,
            device="cpu",
            dtype=self.lora_config.lora_dtype,
        )

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_load_adapter", load_adapter)


@pytest.fixture(scope="module")
def tensors(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    return tensors_of(save_adapter(tmp_path_factory.mktemp("adapters") / "trained", llama))


def tensors_of(adapter: Path) -> Tensors:
    from safetensors.torch import load_file

    return dict(load_file(adapter / "adapter_model.safetensors"))


def recorded(engine: SharedEngine, folder: Path, work: Callable[[], None]) -> Any:
    engine.llm.collective_rpc("lora_probe_begin", args=(str(folder), "shrink"))
    work()
    engine.llm.collective_rpc("lora_probe_finish")
    return open_trace(folder)


def ask(engine: SharedEngine, number: int, name: str = "pushed", tokens: int = 3, **flags: Any) -> list[int]:
    """Ask for an adapter that the engine has, as a server does: by a plain request with its id."""
    from vllm.lora.request import LoRARequest

    return generate(engine, LoRARequest(name, number, "simple_lora_path", **flags), tokens)


def generate(engine: SharedEngine, request: Any, tokens: int = 3) -> list[int]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompt = {"prompt_token_ids": IDS}
    return list(engine.llm.generate([prompt], parameters, use_tqdm=False, lora_request=request)[0].outputs[0].token_ids)


def push(engine: SharedEngine, request: Any) -> None:
    engine.llm.llm_engine.add_lora(request)


def manager_of(engine: SharedEngine) -> Any:
    (manager,) = engine.llm.collective_rpc(lambda worker: [worker.model_runner.lora_manager._adapter_manager])[0]
    return manager


def stages(trace: Any) -> list[str]:
    return [event.stage for event in trace.events]


def test_pushed_tensors_play_the_part_of_the_file(
    pushing: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    number = next(pushing.numbers)

    def work() -> None:
        push(pushing, tensor_request("policy", number, tensors))
        ask(pushing, number, "policy")

    trace = recorded(pushing, tmp_path / "run", work)
    pushing.llm.llm_engine.remove_lora(number)
    ((load, ledger),) = trace.loads
    assert headline(ledger) == WHOLE
    assert (load.name, load.path, load.engine_id, len(load.digest)) == ("policy", "pushed as tensors", number, 64)
    assert {row.stations[station].value for row in ledger.rows for station in STATIONS} == {"ok"}
    assert set(trace.rows.load.tolist()) == {load.load}
    assert next(event.text for event in trace.events if event.stage == "read") == "policy pushed as tensors"
    assert "from the pushed tensors" in next(event.text for event in trace.events if event.stage == "agree")


def test_a_replaced_loader_that_reads_a_file_makes_one_load(
    pushing: SharedEngine, replaced: None, adapter: Path, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    number = next(pushing.numbers)
    request = LoRARequest("healthy", number, str(adapter))
    trace = recorded(pushing, tmp_path / "run", lambda: generate(pushing, request) and None)
    pushing.llm.llm_engine.remove_lora(number)
    ((load, ledger),) = trace.loads
    assert headline(ledger) == WHOLE
    assert (load.name, load.path) == ("healthy", str(adapter))


def test_three_pushes_in_place_are_three_generations(
    pushing: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    number = next(pushing.numbers)

    def work() -> None:
        for step in range(3):
            weights = {name: tensor * (1 + step) for name, tensor in tensors.items()}
            push(pushing, tensor_request("policy", number, weights, load_inplace=True))
            ask(pushing, number, "policy")

    trace = recorded(pushing, tmp_path / "run", work)
    pushing.llm.llm_engine.remove_lora(number)
    assert [(load.engine_id, load.generation, load.reloads) for load, _ in trace.loads] == [
        (number, generation, 0) for generation in range(3)
    ]
    assert [headline(ledger) for _, ledger in trace.loads] == [WHOLE] * 3
    assert len({load.digest for load, _ in trace.loads}) == 3
    assert [trace.rows.load.tolist().count(load.load) for load, _ in trace.loads] == [len(IDS) + 2] * 3
    digests = [placed.digests for placed in trace.rows.placed.values()]
    assert len(set(digests)) == 3


def test_three_pushes_under_new_ids_are_three_loads(
    pushing: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    numbers = [next(pushing.numbers) for _ in range(3)]

    def work() -> None:
        for step, number in enumerate(numbers):
            weights = {name: tensor * (1 + step) for name, tensor in tensors.items()}
            push(pushing, tensor_request(f"step {step}", number, weights))
            ask(pushing, number, f"step {step}")
            pushing.llm.llm_engine.remove_lora(number)

    trace = recorded(pushing, tmp_path / "run", work)
    assert [(load.name, load.engine_id, load.generation) for load, _ in trace.loads] == [
        (f"step {step}", number, 0) for step, number in enumerate(numbers)
    ]
    assert [headline(ledger) for _, ledger in trace.loads] == [WHOLE] * 3
    assert stages(trace).count("unload") == 3


def past_the_loader(engine: SharedEngine, number: int, tensors: Tensors, remove: bool = True) -> None:
    """As in AReaL: the manager's own methods, and no request."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    clones = {name: tensor.clone() for name, tensor in tensors.items()}

    def add(worker: Any) -> None:
        manager = worker.model_runner.lora_manager._adapter_manager
        helper = PEFTHelper.from_dict(CONFIG)
        lora = LoRAModel.from_lora_tensors(number, clones, helper, device="cpu")
        if remove:
            manager.remove_adapter(number)
        manager._add_adapter(lora)
        manager.activate_adapter(number)

    engine.llm.collective_rpc(add)


def test_a_push_past_the_loader(pushing: SharedEngine, tensors: Tensors, tmp_path: Path) -> None:
    number = next(pushing.numbers)

    def work() -> None:
        for step in range(3):
            past_the_loader(pushing, number, {name: tensor * (1 + step) for name, tensor in tensors.items()})
            ask(pushing, number)

    trace = recorded(pushing, tmp_path / "run", work)
    pushing.llm.llm_engine.remove_lora(number)
    assert [(load.name, load.generation) for load, _ in trace.loads] == [(f"adapter {number}", n) for n in range(3)]
    assert [headline(ledger) for _, ledger in trace.loads] == [WHOLE] * 3


def test_a_push_that_does_not_remove_the_old_weights_runs_with_them(
    pushing: SharedEngine, tensors: Tensors, tmp_path: Path
) -> None:
    """vLLM registers the new weights, and leaves those in the slot: the id is active already."""
    number, answers = next(pushing.numbers), []

    def work() -> None:
        for step in range(2):
            weights = {name: tensor * (1 + step) for name, tensor in tensors.items()}
            past_the_loader(pushing, number, weights, remove=False)
            answers.append(ask(pushing, number))

    trace = recorded(pushing, tmp_path / "run", work)
    pushing.llm.llm_engine.remove_lora(number)
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


def test_a_model_that_no_loader_made(pushing: SharedEngine, tensors: Tensors, tmp_path: Path) -> None:
    """Its parts are fused and scaled already, or not."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.lora_weights import LoRALayerWeights

    number = next(pushing.numbers)

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
        pushing.llm.collective_rpc(add)
        ask(pushing, number)

    trace = recorded(pushing, tmp_path / "run", work)
    packed = manager_of(pushing).get_adapter(number)

    def add_again(worker: Any) -> None:
        manager = worker.model_runner.lora_manager._adapter_manager
        manager.remove_adapter(number)
        manager._add_adapter(packed)
        manager.activate_adapter(number)

    def work_again() -> None:
        pushing.llm.collective_rpc(add_again)
        ask(pushing, number)

    again = recorded(pushing, tmp_path / "again", work_again)
    pushing.llm.llm_engine.remove_lora(number)
    for each in (trace, again):
        ((load, ledger),) = each.loads
        assert headline(ledger) == WHOLE
        assert load.path == "pushed as tensors"
    assert {round(module.scaling or 0, 6) for module in trace.modules.values()} == {2.0}
    assert {round(module.scaling or 0, 6) for module in again.modules.values()} == {1.0}


def test_a_push_of_half_the_modules_names_the_others(
    pushing: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    number = next(pushing.numbers)
    half = {name: tensor for name, tensor in tensors.items() if "v_proj" not in name}

    def work() -> None:
        push(pushing, tensor_request("half", number, half))
        ask(pushing, number, "half")

    trace = recorded(pushing, tmp_path / "run", work)
    pushing.llm.llm_engine.remove_lora(number)
    ((_, ledger),) = trace.loads
    assert headline(ledger) == (
        f"{MODULES - LAYERS} of {MODULES} modules took effect, {LAYERS} lost at stored: "
        f"layers 0-{LAYERS - 1} v_proj are not in the pushed tensors (LP204)"
    )


def test_layers_that_were_not_trained_are_not_missed(
    pushing: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    """vLLM's PEFTHelper drops the field that says so."""
    number = next(pushing.numbers)
    first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    config = CONFIG | {"layers_to_transform": [0], "target_modules": {"q_proj", "k_proj", "v_proj"}}

    def work() -> None:
        push(pushing, tensor_request("first", number, first, config))
        ask(pushing, number, "first")

    trace = recorded(pushing, tmp_path / "run", work)
    pushing.llm.llm_engine.remove_lora(number)
    assert headline(trace.loads[0][1]) == "3 of 3 modules took effect"


def test_a_push_under_wrong_names_is_lost_at_read(
    pushing: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path
) -> None:
    """None of its modules has a home: the recording goes on, and another adapter is recorded beside it."""
    numbers = [next(pushing.numbers), next(pushing.numbers)]
    wrong = {name.replace("base_model.model.model.", ""): tensor for name, tensor in tensors.items()}

    def work() -> None:
        push(pushing, tensor_request("wrong", numbers[0], wrong))
        ask(pushing, numbers[0], "wrong")
        push(pushing, tensor_request("right", numbers[1], tensors))
        ask(pushing, numbers[1], "right")
        ask(pushing, numbers[1], "right")

    trace = recorded(pushing, tmp_path / "run", work)
    for number in numbers:
        pushing.llm.llm_engine.remove_lora(number)
    (_, wrong_ledger), (_, right_ledger) = trace.loads
    assert headline(wrong_ledger) == (
        f"0 of {MODULES} modules took effect, {MODULES} lost at read: "
        "the names in the pushed tensors begin with `layers`, the model's with `model.layers` (LP501)"
    )
    assert headline(right_ledger) == WHOLE
    assert "probe" not in stages(trace)


def test_a_refused_push_is_refused(pushing: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path) -> None:
    number = next(pushing.numbers)
    odd = {name.replace("lora_A.weight", "lora_C.weight"): tensor for name, tensor in tensors.items()}

    def work() -> None:
        with pytest.raises(ValueError, match="unsupported LoRA weight"):
            push(pushing, tensor_request("odd", number, odd))

    ((load, ledger),) = recorded(pushing, tmp_path / "run", work).loads
    assert load.refused
    assert "unsupported LoRA weight" in headline(ledger)


def test_an_empty_push_is_refused(pushing: SharedEngine, replaced: None, tmp_path: Path) -> None:
    """vLLM fails at it with a StopIteration."""
    number = next(pushing.numbers)

    def work() -> None:
        with pytest.raises((StopIteration, RuntimeError)):
            push(pushing, tensor_request("empty", number, {}))

    ((load, ledger),) = recorded(pushing, tmp_path / "run", work).loads
    assert load.refused
    assert ledger.count("lost") == MODULES


def test_load_inplace_on_every_step_is_one_load(
    pushing: SharedEngine, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """vLLM keeps the flag of the request, and reloads in every step. The hint cures it."""
    from vllm.lora.request import LoRARequest

    tokens, number = 14, next(pushing.numbers)
    inplace = LoRARequest("healthy", number, str(adapter), load_inplace=True)
    trace = recorded(pushing, tmp_path / "run", lambda: generate(pushing, inplace, tokens) and None)
    ((load, ledger),) = trace.loads
    assert (load.generation, load.reloads) == (0, tokens - 1)
    assert headline(ledger) == WHOLE
    (diagnostic,) = [diagnostic for diagnostic in diagnose(ledger) if diagnostic.code == "LP506"]
    assert f"{tokens - 1} more times" in diagnostic.message
    seen = stages(trace)
    assert [seen.count(stage) for stage in ("activate", "register", "evict", "unload")] == [1, 1, 0, 0]
    assert seen.count("fold") == MODULES
    assert set(trace.rows.load.tolist()) == {load.load}
    pushing.llm.llm_engine.remove_lora(number)
    _, out, _ = call("show", tmp_path / "run", capsys=capsys)
    assert out.count("LP506 reloaded-unchanged") == 1
    assert f"the unchanged adapter was read {tokens - 1} more times" in out

    plain = LoRARequest("healthy", number, str(adapter))

    def cured() -> None:
        push(pushing, inplace)
        generate(pushing, plain, tokens)

    ((load, ledger),) = recorded(pushing, tmp_path / "cured", cured).loads
    assert load.reloads == 0
    assert diagnose(ledger) == []
    pushing.llm.llm_engine.remove_lora(number)


def test_an_adapter_that_is_evicted_from_the_cache_is_the_same_load_again(
    pushing: SharedEngine, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    other = save_adapter(tmp_path / "other", llama, seed=5)
    numbers = [next(pushing.numbers), next(pushing.numbers)]
    requests = [
        LoRARequest(path.name, number, str(path)) for path, number in zip((adapter, other), numbers, strict=True)
    ]

    def work() -> None:
        for request in requests * 2:
            generate(pushing, request)

    trace = recorded(pushing, tmp_path / "run", work)
    for number in numbers:
        pushing.llm.llm_engine.remove_lora(number)
    assert [(load.name, load.generation, load.reloads) for load, _ in trace.loads] == [
        ("healthy", 0, 0),
        ("other", 0, 0),
    ]
    assert [headline(ledger) for _, ledger in trace.loads] == [WHOLE] * 2
    assert sum("again, unchanged" in event.text for event in trace.events) == 2
    counts = [stages(trace).count(stage) for stage in ("activate", "evict", "register", "fold")]
    assert counts == [4, 3, 2, 2 * MODULES]


def test_a_slot_that_vllm_failed_to_fill_is_known(
    pushing: SharedEngine, adapter: Path, tmp_path: Path, replaced: None, tensors: Tensors
) -> None:
    """The first attempt raises; the second one does not, and requests are served from what is in the slot."""
    import torch

    numbers = [next(pushing.numbers), next(pushing.numbers)]
    name = "model.layers.0.self_attn.o_proj"
    stored_as = f"base_model.model.{name}"
    bad = {key: tensor * 2 for key, tensor in tensors.items()}
    bad |= {f"{stored_as}.lora_A.weight": torch.randn(8, 128), f"{stored_as}.lora_B.weight": torch.randn(4096, 8)}
    config = CONFIG | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}

    def work() -> None:
        push(pushing, tensor_request("good", numbers[0], tensors))
        ask(pushing, numbers[0], "good")
        request = tensor_request("bad", numbers[1], bad, config)
        with pytest.raises(RuntimeError, match="size"):
            push(pushing, request)
        push(pushing, request)
        ask(pushing, numbers[1], "bad")

    trace = recorded(pushing, tmp_path / "run", work)
    slots = list(manager_of(pushing).lora_index_to_id)
    for number in numbers:
        pushing.llm.llm_engine.remove_lora(number)
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
    assert trace.rows.load.tolist().count(load.load) == len(IDS) + 2


def test_removing_all_adapters_is_an_eviction_and_dummies_are_no_loads(
    pushing: SharedEngine, adapter: Path, tmp_path: Path
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
        generate(pushing, request)
        pushing.llm.collective_rpc(lambda worker: worker.model_runner.lora_manager.remove_all_adapters())
        pushing.llm.collective_rpc(dummy_run)
        generate(pushing, request)

    trace = recorded(pushing, tmp_path / "run", work)
    pushing.llm.llm_engine.remove_lora(1)
    ((load, ledger),) = trace.loads
    assert (load.name, headline(ledger)) == ("healthy", WHOLE)
    (evicted,) = [event.text for event in trace.events if event.stage == "evict"]
    assert evicted == "healthy removed from slot 0 with all adapters"
    assert stages(trace).count("activate") == 2
    assert set(trace.rows.load.tolist()) == {load.load}


@pytest.mark.parametrize("limit", [2**30, 1000])
def test_a_large_push_is_copied_within_a_limit(
    pushing: SharedEngine,
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
    number = next(pushing.numbers)

    def work() -> None:
        request = tensor_request("large", number, tensors)
        push(pushing, request)
        for tensor in request.lora_tensors.values():
            tensor.zero_()
        ask(pushing, number, "large")

    ((_, ledger),) = recorded(pushing, tmp_path / "run", work).loads
    pushing.llm.llm_engine.remove_lora(number)
    assert headline(ledger) == WHOLE
    values = {row.stations[station].value for row in ledger.rows for station in ("placed", "agrees")}
    assert values == {"ok" if limit > 1000 else "unknown"}
    if limit == 1000:
        (placed,) = {row.stations["placed"].message for row in ledger.rows}
        assert "no copy of the pushed tensors was kept" in placed
        assert "the limit for a copy is 1,000" in placed


def test_a_trace_of_a_pushed_adapter_is_shown(
    pushing: SharedEngine, replaced: None, tensors: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = next(pushing.numbers)

    def work() -> None:
        push(pushing, tensor_request("policy", number, tensors))
        ask(pushing, number, "policy")

    recorded(pushing, tmp_path / "run", work)
    pushing.llm.llm_engine.remove_lora(number)
    status, out, _ = call("show", tmp_path / "run", capsys=capsys)
    assert status == 0
    assert "pushed as tensors" in out
    assert WHOLE in out
