"""The vLLM engine with the probe in it, compared with PEFT and damaged on purpose. All tests share one engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, PROMPTS, SharedEngine, edited, record_peft, save_adapter
from safetensors.numpy import load_file

from lora_probe.adapter.variants import ALPHA_PATTERN
from lora_probe.comparison import compare
from lora_probe.ledger import STATIONS, headline
from lora_probe.recording.rows import places
from lora_probe.rules import diagnose
from lora_probe.rules.vllm_versions import behaviour
from lora_probe_vllm.seams import vllm_version

pytestmark = pytest.mark.engine
MODULES = 3 * LAYERS
AFTER_THE_LAST_STATION = ("steps.Steps.close", "loading.Loading.removed", "steps.Steps.deactivated")
"""Places of the probe that are passed when a load has already been judged."""


def ledger_of(trace: Any) -> Any:
    ((_, ledger),) = trace.loads
    return ledger


def values(ledger: Any, module: str) -> dict[str, str]:
    (row,) = [row for row in ledger.rows if row.module == module]
    return {station: row.stations[station].value for station in STATIONS}


def test_a_healthy_adapter_takes_effect_and_agrees_with_peft(
    engine: SharedEngine, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    mine = record_peft(adapter, llama, tmp_path / "peft")
    theirs = engine.record(adapter, tmp_path / "vllm")
    for trace in (mine, theirs):
        assert headline(ledger_of(trace)) == f"{MODULES} of {MODULES} modules took effect"
        assert trace.complete
    found = compare(mine, theirs)
    assert found.verdict == "agree"
    assert [request.equal for request in found.requests] == [True, True]
    assert all(diff.exact and diff.error is not None and diff.error < 1e-5 for diff in found.modules)
    assert len(found.modules) == MODULES
    with_adapter, base = ([r.output_ids for r in theirs.requests if (r.adapter is None) == no] for no in (False, True))
    assert with_adapter != base


def test_a_run_that_follows_another_sees_its_tokens(
    engine: SharedEngine, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    mine = record_peft(adapter, llama, tmp_path / "peft")
    given = [request.output_ids[:-1] for request in mine.requests if request.adapter]
    theirs = engine.record(adapter, tmp_path / "vllm", max_tokens=1, continuation=given)
    found = compare(mine, theirs)
    assert found.verdict == "agree"
    assert found.rows == len(mine.rows)
    with_adapter = theirs.requests[-1]
    assert with_adapter.text.startswith(with_adapter.forced_text)
    assert with_adapter.generated_text


def test_rows_are_those_of_the_requests(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    trace = engine.record(adapter, tmp_path / "run", max_tokens=4)
    rows = trace.rows
    for request in trace.requests:
        mine = np.array([rows.requests[number] == request.id for number in rows.request])
        # The last token of an answer is sampled and never fed back.
        assert sorted(rows.position[mine]) == list(range(len(request.prompt_ids) + len(request.output_ids) - 1))
        phases = rows.phase[mine][np.argsort(rows.position[mine])]
        assert phases.tolist() == [0] * len(request.prompt_ids) + [1] * (len(request.output_ids) - 1)
        assert set(rows.load[mine].tolist()) == ({-1} if request.adapter is None else {0})
        contributions = rows.delta_norm[mine]
        # A row without a load has columns only if it has a contribution.
        assert np.isnan(contributions).all() if request.adapter is None else (contributions > 0).all()


def test_shrink_and_gram_give_the_contribution(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    from lora_probe import inspect

    trace = engine.record(adapter, tmp_path / "run", keep="tensors", max_tokens=3)
    rows = trace.rows
    held = inspect(adapter).by_key()
    mine = rows.load == 0
    for number, key in enumerate(rows.modules):
        pair = held[key]
        a, b = inspect(adapter).values(pair.a), inspect(adapter).values(pair.b)
        x = rows.x[key][mine]
        delta = pair.scaling * (x @ a.T) @ b.T
        np.testing.assert_allclose(rows.delta[key][mine], delta, atol=2e-5)
        np.testing.assert_allclose(rows.shrink[mine, number, : pair.rank], x @ a.T, atol=2e-5)
        np.testing.assert_allclose(rows.delta_norm[mine, number], np.linalg.norm(delta, axis=-1), rtol=1e-4)
        np.testing.assert_allclose(rows.x_norm[mine, number], np.linalg.norm(x, axis=-1), rtol=1e-5)
        output = rows.base[key][mine] + delta
        np.testing.assert_allclose(rows.output_norm[mine, number], np.linalg.norm(output, axis=-1), rtol=1e-4)


def test_recording_changes_no_token(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    answers = {
        keep: [r.output_ids for r in engine.record(adapter, tmp_path / keep, keep=keep, max_tokens=12).requests]
        for keep in ("events", "norms", "shrink", "tensors")
    }
    assert answers["events"] == answers["norms"] == answers["shrink"] == answers["tensors"]


def test_the_loading_story(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    trace = engine.record(adapter, tmp_path / "run")
    stages = [event.stage for event in trace.events]
    order = ["wrap", "manager", "read", "fold", "pack", "register", "set", "activate", "agree"]
    assert [stage for stage in dict.fromkeys(stages) if stage in order] == order
    wrapped = {event.module: event.text for event in trace.events if event.stage == "wrap"}
    assert wrapped["model.layers.0.self_attn.qkv_proj"] == "QKVParallelLinear -> MergedQKVParallelLinearWithLoRA"
    assert [event.facts["scaling"] for event in trace.events if event.stage == "fold"] == [2.0] * MODULES
    touched = {event.module: event.stage for event in trace.events if event.stage in ("set", "reset")}
    assert touched["model.layers.1.self_attn.qkv_proj"] == "set"
    assert touched["model.layers.1.mlp.down_proj"] == "reset"
    assert all(event.seconds is not None for event in trace.events if event.stage in ("set", "reset", "pack", "fold"))
    row = ledger_of(trace).rows[1]
    assert (row.module, row.engine_as) == (
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.self_attn.qkv_proj[1]",
    )


def test_a_dead_prefix_is_lost_at_read_and_vllm_says_nothing(
    engine: SharedEngine, adapter: Path, tmp_path: Path
) -> None:
    wrong = edited(
        adapter,
        tmp_path / "prefix",
        lambda tensors: {
            name.replace("model.model.layers", "model.model.language_model.layers"): tensor
            for name, tensor in tensors.items()
        },
    )
    trace = engine.record(wrong, tmp_path / "run")
    ledger = ledger_of(trace)
    text = headline(ledger)
    assert text.startswith(f"0 of {MODULES} modules took effect, {MODULES} lost at read: ")
    assert "`model.language_model.layers`" in text
    assert "`model.layers`" in text
    assert "(LP501)" in text
    assert trace.loads[0][0].said == []
    answers = {(r.prompt, r.adapter is None): r.output_ids for r in trace.requests}
    assert all(answers[(number, True)] == answers[(number, False)] for number in range(len(PROMPTS)))


def test_another_rank_in_the_config_is_wrong_at_stored_and_applied(
    engine: SharedEngine, llama: Path, tmp_path: Path
) -> None:
    rank4 = save_adapter(tmp_path / "rank4", llama, r=4)
    wrong = edited(rank4, tmp_path / "wrong", config=lambda config: config | {"r": 8})
    trace = engine.record(wrong, tmp_path / "vllm")
    ledger = ledger_of(trace)
    expected = "r=8 in the config, rank 4 in the tensors, so the config's scaling of 2 may be wrong (LP201)"
    assert headline(ledger) == (f"0 of {MODULES} modules took effect as trained, {MODULES} wrong at stored: {expected}")
    assert {values(ledger, row.module)["stored"] for row in ledger.rows} == {"wrong"}
    assert {values(ledger, row.module)["applied"] for row in ledger.rows} == {"ok"}
    refusal = ledger_of(record_peft(wrong, llama, tmp_path / "peft"))
    assert refusal.refused
    assert "size mismatch" in refusal.message


def test_a_missing_layer_is_named(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    wrong = edited(
        adapter, tmp_path / "hole", lambda tensors: {n: t for n, t in tensors.items() if ".layers.1." not in n}
    )
    ledger = ledger_of(engine.record(wrong, tmp_path / "run"))
    assert headline(ledger) == (
        f"{MODULES - 3} of {MODULES} modules took effect, "
        "3 lost at stored: layer 1 q_proj, k_proj, v_proj are not in the file (LP204)"
    )


def test_a_slot_that_changes_after_activation_is_wrong_at_placed(
    engine: SharedEngine, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.model_manager import LoRAModelManager

    original = LoRAModelManager.activate_adapter

    def activate_and_damage(self: Any, lora_id: int) -> bool:
        new = lora_id not in self._active_adapters
        result = original(self, lora_id)
        if new:
            slot = self.lora_index_to_id.index(lora_id)
            self.modules["model.layers.2.self_attn.qkv_proj"].lora_b_stacked[1][slot] *= 1.01
        return result

    monkeypatch.setattr(LoRAModelManager, "activate_adapter", activate_and_damage)
    ledger = ledger_of(engine.record(adapter, tmp_path / "run"))
    damaged = "model.layers.2.self_attn.k_proj"
    assert [row.module for row in ledger.rows if row.fate != "took effect"] == [damaged]
    assert values(ledger, damaged)["placed"] == "wrong"
    (row,) = [row for row in ledger.rows if row.module == damaged]
    assert "differs from the file by 0.01 relative, seen when the run ended" in row.stations["placed"].message
    # The kernel works with what the slot holds: on the same x its result is off by the same 1 %.
    assert values(ledger, damaged)["agrees"] == "wrong"


def test_a_mixed_batch_contaminates_the_base_on_this_cpu_backend(
    engine: SharedEngine, adapter: Path, tmp_path: Path
) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from lora_probe import open_trace

    folder, number = tmp_path / "run", next(engine.numbers)
    engine.llm.collective_rpc("lora_probe_begin", args=(str(folder), "shrink"))
    request = LoRARequest("healthy", number, str(adapter))
    engine.llm.llm_engine.add_lora(request)
    prompts = [{"prompt_token_ids": [40, 41, 42, 43]}, {"prompt_token_ids": [50, 51, 52]}]
    parameters = SamplingParams(temperature=0, max_tokens=3)
    engine.llm.generate(prompts, parameters, use_tqdm=False, lora_request=[None, request])
    engine.llm.collective_rpc("lora_probe_finish")
    engine.llm.llm_engine.remove_lora(number)
    trace = open_trace(folder)
    assert [finding.code for finding in trace.request_findings] == ["LP602"]
    assert headline(ledger_of(trace)) == f"{MODULES} of {MODULES} modules took effect"


def test_a_refusal_is_recorded_with_the_engines_words(engine: SharedEngine, llama: Path, tmp_path: Path) -> None:
    large = save_adapter(tmp_path / "rank32", llama, r=32)
    trace = engine.record(large, tmp_path / "run")
    ledger = ledger_of(trace)
    assert headline(ledger) == "refused by vllm: LoRA rank 32 is greater than max_lora_rank 16. (LP401)"
    assert [d.code for d in diagnose(ledger)] == ["LP401"]


def test_half_a_pair(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    wrong = edited(adapter, tmp_path / "half", lambda tensors: {n: t for n, t in tensors.items() if n != name})
    ledger = ledger_of(engine.record(wrong, tmp_path / "run"))
    found = values(ledger, "model.layers.0.self_attn.q_proj")
    assert (found["stored"], found["placed"]) == ("wrong", "absent")
    assert ledger.count("took effect") == MODULES - 1


def test_an_untrained_module_is_lost_though_it_is_applied(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    wrong = edited(adapter, tmp_path / "zero", lambda tensors: tensors | {name: tensors[name] * 0})
    ledger = ledger_of(engine.record(wrong, tmp_path / "run"))
    (row,) = [row for row in ledger.rows if row.fate == "lost"]
    assert row.module == "model.layers.0.self_attn.v_proj"
    assert row.decisive is not None
    assert row.decisive[1].code == "LP203"


def test_a_pair_that_is_too_small_is_seen_though_vllm_pads_it(
    engine: SharedEngine, adapter: Path, tmp_path: Path
) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    wrong = edited(adapter, tmp_path / "small", lambda tensors: tensors | {name: tensors[name][:, :64]})
    ledger = ledger_of(engine.record(wrong, tmp_path / "run"))
    (row,) = [row for row in ledger.rows if row.fate == "wrong"]
    assert row.stations["stored"].code == "LP301"
    assert "has 64 inputs, the base model's weight has 128" in row.stations["stored"].message


def test_patterns_and_rslora_are_healthy(engine: SharedEngine, llama: Path, tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}}
    for name, config in (("patterns", patterns), ("rslora", {"use_rslora": True}), ("one", {"lora_alpha": 8})):
        made = save_adapter(tmp_path / name, llama, **config)
        trace = engine.record(made, tmp_path / f"{name}-run")
        if name == "patterns" and not behaviour(vllm_version()).at_least(ALPHA_PATTERN.vllm_applies):
            # An older vLLM ignores both patterns, and the trace names the modules that are wrong.
            assert {row.decisive[1].code for row in ledger_of(trace).rows if row.decisive} == {"LP504"}
            continue
        assert headline(ledger_of(trace)) == f"{MODULES} of {MODULES} modules took effect", name


def test_an_embedding_is_followed_to_the_end(engine: SharedEngine, llama: Path, tmp_path: Path) -> None:
    made = save_adapter(tmp_path / "embedding", llama, target_modules=["q_proj", "embed_tokens"])
    trace = engine.record(made, tmp_path / "run")
    assert headline(ledger_of(trace)) == f"{LAYERS + 1} of {LAYERS + 1} modules took effect"
    tensors = load_file(made / "adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding"
    a, b = tensors[f"{prefix}_A"], tensors[f"{prefix}_B"]
    column = trace.rows.modules.index(("model.embed_tokens", "weight", None))
    # Rows of the base model have no columns.
    assert {segment.width("shrink") for segment in trace.workers[0].opened_segments() if segment.modules} == {8}
    at = places(trace.rows)
    for request in trace.requests:
        for position, token in enumerate([*request.prompt_ids, *request.output_ids[:-1]] if request.adapter else ()):
            row = at[request.id, position]
            expected = np.linalg.norm(2.0 * b @ a[:, token])
            np.testing.assert_allclose(trace.rows.delta_norm[row, column], expected, rtol=1e-5)
            np.testing.assert_allclose(trace.rows.shrink[row, column, : len(a)], a[:, token], rtol=1e-6)
            assert trace.rows.x_norm[row, column] == 1
            assert trace.rows.output_norm[row, column] > 0


def test_a_fault_in_the_slot_of_an_embedding(
    engine: SharedEngine, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.layers import VocabParallelEmbeddingWithLoRA as Layer

    whole = Layer.set_lora

    def half(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        whole(self, index, lora_a, lora_b * 0.5)

    monkeypatch.setattr(Layer, "set_lora", half)
    made = save_adapter(tmp_path / "embedding", llama, target_modules=["q_proj", "embed_tokens"])
    ledger = ledger_of(engine.record(made, tmp_path / "run"))
    (row,) = [row for row in ledger.rows if row.fate == "wrong"]
    assert row.module == "model.embed_tokens"
    assert {name: finding.value for name, finding in row.stations.items()} == {
        "stored": "ok",
        "read": "ok",
        "placed": "wrong",
        "applied": "ok",
        "agrees": "wrong",
    }


def test_a_head_is_followed_to_the_end(engine: SharedEngine, llama: Path, tmp_path: Path) -> None:
    """It has a row for each sampled token, and none in the trace."""
    made = save_adapter(tmp_path / "head", llama, target_modules=["q_proj", "lm_head"])
    trace = engine.record(made, tmp_path / "run")
    assert headline(ledger_of(trace)) == f"{LAYERS + 1} of {LAYERS + 1} modules took effect"
    assert ("lm_head", "weight", None) not in trace.rows.modules
    (agreed,) = (event for event in trace.events if event.stage == "agree")
    error, _, samples = agreed.facts["errors"]["lm_head"]
    assert 0 < error < 1e-5
    # The last row of each prompt that is short enough to be sampled whole, and the first tokens after it.
    assert samples >= 2


def test_a_fault_in_the_kernel_of_a_head(
    engine: SharedEngine, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Punica

    whole = Punica.add_lora_logits

    def half(self: Any, y: Any, x: Any, a: Any, b: Any, scale: float, **more: Any) -> Any:
        return whole(self, y, x, a, b, scale / 2, **more)

    monkeypatch.setattr(Punica, "add_lora_logits", half)
    made = save_adapter(tmp_path / "head", llama, target_modules=["q_proj", "lm_head"])
    (row,) = [row for row in ledger_of(engine.record(made, tmp_path / "run")).rows if row.fate == "wrong"]
    assert (row.module, row.stations["placed"].value, row.stations["agrees"].code) == ("lm_head", "ok", "LP604")


def test_keep_events_measures_what_it_can(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    trace = engine.record(adapter, tmp_path / "run", keep="events")
    ledger = ledger_of(trace)
    assert trace.rows is None
    assert ledger.count("unknown") == MODULES
    assert {row.stations["placed"].value for row in ledger.rows} == {"ok"}
    assert "contributions were not recorded (--keep events)" in headline(ledger)


def test_the_probe_leaves_nothing_on_the_layers(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    engine.record(adapter, tmp_path / "run")
    from lora_probe_vllm.stand_in import StandIn

    def leftovers(worker: Any) -> list[str]:
        layers = worker.model_runner.lora_manager._adapter_manager.modules
        return [
            name
            for name, layer in layers.items()
            if isinstance(layer.punica_wrapper, StandIn) or layer._forward_hooks or "set_lora" in vars(layer)
        ]

    assert engine.llm.collective_rpc(leftovers) == [[]]


def test_a_failure_of_the_probe_does_not_fail_the_request(
    engine: SharedEngine, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_probe_vllm import steps

    def broken(*_: Any) -> Any:
        raise RuntimeError("made on purpose")

    monkeypatch.setattr(steps, "rows_of", broken)
    trace = engine.record(adapter, tmp_path / "run")
    assert len(trace.requests) == 2 * len(PROMPTS)
    assert any("made on purpose" in event.text for event in trace.events if event.stage == "probe")
    ledger = ledger_of(trace)
    assert ledger.count("unknown") == MODULES
    assert "the probe failed and stopped" in headline(ledger)


@pytest.fixture(scope="module")
def answers(engine: SharedEngine, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of a healthy recording."""
    trace = engine.record(adapter, tmp_path_factory.mktemp("answers") / "run", max_tokens=3)
    return [request.output_ids for request in trace.requests]


@pytest.mark.parametrize(
    "place",
    [
        "loading.Loading.reading",
        "loads.ActiveLoad.judge_read",
        "loading.Loading.was_read",
        "loading.Loading.adding",
        "loading.Loading.activated",
        "loads.ActiveLoad.judge_slots",
        "loads.ActiveLoad.contents",
        "loading.Loading.event",
        "stand_in.StandIn._before",
        "stand_in.StandIn._with_delta",
        "capture.Capture._sketch",
        "measured.Columns.stack",
        "capture.Capture.rows",
        "steps.Steps._follow",
        "steps.Steps._blame",
        "steps.contaminated_rows",
        "steps.compare_samples",
        "steps.count_heads",
        "blocks.Blocks.step",
        "loading.Loading.evicted",
        "loading.Loading.removed",
        "steps.Steps.deactivated",
        "steps.Steps.close",
    ],
)
def test_an_exception_anywhere_in_the_probe_changes_no_answer(
    place: str,
    answers: list[list[int]],
    engine: SharedEngine,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from importlib import import_module

    raised = []

    def broken(*_: Any, **__: Any) -> Any:
        raised.append(place)
        raise RuntimeError("made on purpose")

    module, *owners, name = place.split(".")
    owner: Any = import_module(f"lora_probe_vllm.{module}")
    for attribute in owners:
        owner = getattr(owner, attribute)
    monkeypatch.setattr(owner, name, broken)
    trace = engine.record(adapter, tmp_path / "run", max_tokens=3)
    monkeypatch.undo()
    assert [request.output_ids for request in trace.requests] == answers
    ((_, ledger),) = trace.loads or ((None, None),)
    reported = any("made on purpose" in event.text for event in trace.events if event.stage == "probe")
    assert reported or not raised
    # A probe that failed never claims that all is well.
    assert not raised or ledger is None or not ledger.healthy or place in AFTER_THE_LAST_STATION


def test_the_trace_is_json_all_through(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    from lora_probe.render.json.trace import recording_json
    from lora_probe.render.results import Recording

    data = json.loads(json.dumps(recording_json(Recording(engine.record(adapter, tmp_path / "run"))), allow_nan=False))
    assert data["schema_version"] == 1
    assert data["ledger"]["vllm"]["took_effect"] == MODULES
    assert len(data["modules"]) == MODULES
    assert data["requests"][0]["base_text"] is not None


def test_a_second_load_under_the_same_id_is_a_load_of_its_own(
    engine: SharedEngine, adapter: Path, llama: Path, tmp_path: Path
) -> None:
    """Removed and added again, then evicted by another adapter: every load keeps its ledger."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from lora_probe import open_trace

    other = save_adapter(tmp_path / "other", llama, seed=5)
    folder, numbers = tmp_path / "run", [next(engine.numbers), next(engine.numbers)]
    engine.llm.collective_rpc("lora_probe_begin", args=(str(folder), "shrink"))
    parameters = SamplingParams(temperature=0, max_tokens=2)

    def ask(number: int, path: Path) -> None:
        # Loaded by the request itself, as servers do: its very first step is recorded.
        request = LoRARequest(path.name, number, str(path))
        engine.llm.generate([{"prompt_token_ids": [40, 41]}], parameters, use_tqdm=False, lora_request=request)

    ask(numbers[0], adapter)
    engine.llm.llm_engine.remove_lora(numbers[0])
    ask(numbers[0], adapter)
    ask(numbers[1], other)
    engine.llm.collective_rpc("lora_probe_finish")
    for number in numbers:
        engine.llm.llm_engine.remove_lora(number)
    trace = open_trace(folder)
    assert [(load.name, load.generation) for load, _ in trace.loads] == [("healthy", 0), ("healthy", 1), ("other", 0)]
    for load, ledger in trace.loads:
        assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect", load
    assert len(trace.rows) == 3 * 3
    # G of each load goes with its own rows.
    rows = trace.rows
    assert sorted(rows.placed) == [0, 1, 2]
    assert rows.placed[0].digests == rows.placed[1].digests != rows.placed[2].digests
    for load, placed in rows.placed.items():
        mine = rows.load == load
        delta = np.sqrt(np.einsum("nmr,mrs,nms->nm", rows.shrink[mine], placed.gram, rows.shrink[mine]))
        np.testing.assert_allclose(delta, rows.delta_norm[mine], rtol=1e-4)


def test_the_file_may_go_away_after_loading(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    import shutil

    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from lora_probe import open_trace

    gone = edited(adapter, tmp_path / "gone")
    folder, number = tmp_path / "run", next(engine.numbers)
    engine.llm.collective_rpc("lora_probe_begin", args=(str(folder), "shrink"))
    request = LoRARequest("gone", number, str(gone))
    engine.llm.llm_engine.add_lora(request)
    shutil.rmtree(gone)
    parameters = SamplingParams(temperature=0, max_tokens=2)
    engine.llm.generate([{"prompt_token_ids": [40, 41]}], parameters, use_tqdm=False, lora_request=request)
    engine.llm.collective_rpc("lora_probe_finish")
    engine.llm.llm_engine.remove_lora(number)
    assert ledger_of(open_trace(folder)).healthy


def test_keys_without_the_prefix_are_taken_by_vllm(engine: SharedEngine, adapter: Path, tmp_path: Path) -> None:
    bare = edited(adapter, tmp_path / "bare", lambda t: {n.removeprefix("base_model.model."): v for n, v in t.items()})
    assert ledger_of(engine.record(bare, tmp_path / "run")).healthy


def test_a_layer_that_goes_round_the_stand_in_is_unknown_not_lost(
    engine: SharedEngine, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like fully sharded layers, which call the kernels themselves."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    from lora_probe_vllm.stand_in import StandIn

    def around(self: Any, x: Any, output: Any) -> Any:
        real = self.punica_wrapper._real if isinstance(self.punica_wrapper, StandIn) else self.punica_wrapper
        real.add_lora_linear(output, x, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices)
        return output

    monkeypatch.setattr(BaseLinearLayerWithLoRA, "_apply_lora_to_output", around)
    ledger = ledger_of(engine.record(adapter, tmp_path / "run"))
    assert ledger.count("unknown") == MODULES
    assert "a way that is not captured yet" in headline(ledger)


def test_a_failure_inside_a_layer_does_not_fail_the_request(
    engine: SharedEngine, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_probe_vllm import stand_in

    healthy = [request.output_ids for request in engine.record(adapter, tmp_path / "healthy").requests]

    def broken(*_: Any) -> Any:
        raise RuntimeError("made on purpose")

    monkeypatch.setattr(stand_in, "norm", broken)
    trace = engine.record(adapter, tmp_path / "run")
    assert [request.output_ids for request in trace.requests] == healthy
    assert ledger_of(trace).count("unknown") == MODULES


def test_names_of_other_base_files_find_their_modules(engine: SharedEngine) -> None:
    """`layers.0...` in a file whose class adds `model.`; a name that is nowhere is nobody's."""
    from lora_probe_vllm.slots import Homes

    def look(worker: Any) -> dict[str, str]:
        homes = Homes(worker.model_runner.lora_manager._adapter_manager)
        names = ("model.layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "visual.q_proj", "q_proj")
        return homes.of_base(dict.fromkeys(names))

    assert engine.llm.collective_rpc(look) == [
        {
            "model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj",
            "layers.1.self_attn.q_proj": "model.layers.1.self_attn.q_proj",
        }
    ]
