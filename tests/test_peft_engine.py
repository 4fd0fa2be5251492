"""The PEFT engine: stations, rows, refusals; and comparisons of its traces."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, PROMPTS, edited, record_peft, save_adapter

from lora_probe import inspect, trace
from lora_probe.comparison import compare
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.ledger import headline

MODULES = 3 * LAYERS


def ledger_of(trace: Any) -> Any:
    ((_, ledger),) = trace.loads
    return ledger


def test_a_healthy_adapter(peft_trace: Any, adapter: Path) -> None:
    assert headline(ledger_of(peft_trace)) == f"{MODULES} of {MODULES} modules took effect"
    assert peft_trace.complete
    rows = peft_trace.rows
    asked = [r for r in peft_trace.requests if r.adapter]
    assert len(rows) == sum(len(r.prompt_ids) + len(r.output_ids) - 1 for r in asked)
    assert (rows.delta_norm > 0).all()
    assert set(rows.phase.tolist()) == {0, 1}
    held = inspect(adapter).by_key()
    for number, key in enumerate(rows.modules):
        b = inspect(adapter).values(held[key].b) * held[key].scaling
        delta = np.linalg.norm(rows.shrink[:, number] @ b.T, axis=-1)
        np.testing.assert_allclose(rows.delta_norm[:, number], delta, rtol=1e-4)


def test_answers_are_those_of_generate(peft_trace: Any, adapter: Path, llama: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), adapter)
    for request in peft_trace.requests:
        ids = torch.tensor([request.prompt_ids])
        settings = {
            "do_sample": False,
            "max_new_tokens": 6,
            "attention_mask": torch.ones_like(ids),
            "pad_token_id": 256,
        }
        if request.adapter is None:
            with model.disable_adapter():
                expected = model.generate(input_ids=ids, **settings)
        else:
            expected = model.generate(input_ids=ids, **settings)
        assert request.output_ids == expected[0, ids.shape[1] :].tolist()


def test_no_hook_is_left(adapter: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_probe.engines.peft import engine as engine

    seen = []
    original = engine.attach

    def attach(model: Any, *rest: Any) -> Any:
        seen.append(model)
        return original(model, *rest)

    monkeypatch.setattr(engine, "attach", attach)
    record_peft(adapter, llama, tmp_path / "run")
    assert not any(module._forward_hooks for module in seen[0].modules())


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (lambda t: {n: v for n, v in t.items() if "layers.1" not in n}, "3 lost at stored: layer 1"),
        (lambda t: {n.replace("model.model", "model.model.x"): v for n, v in t.items()}, f"{MODULES} lost at read"),
        (lambda t: t | {n: v * 0 for n, v in t.items() if "0.self_attn.q_proj.lora_B" in n}, "ΔW is exactly zero"),
        (lambda t: t | {n: v * float("nan") for n, v in t.items() if "0.self_attn.q_proj.lora_B" in n}, "(LP205)"),
    ],
)
def test_damage(adapter: Path, llama: Path, tmp_path: Path, tensors: Any, text: str) -> None:
    trace = record_peft(edited(adapter, tmp_path / "a", tensors), llama, tmp_path / "run")
    assert text in headline(ledger_of(trace))


def test_narrower_targets_are_lost_at_placed(adapter: Path, llama: Path, tmp_path: Path) -> None:
    narrow = edited(adapter, tmp_path / "a", config=lambda c: c | {"target_modules": ["q_proj"]})
    ledger = ledger_of(record_peft(narrow, llama, tmp_path / "run"))
    assert ledger.count("took effect") == LAYERS
    assert {row.decisive[1].code for row in ledger.rows if row.decisive} == {"LP502"}
    assert {row.expected_by for row in ledger.rows if row.decisive} == {("file",)}


def test_dora_is_judged_by_its_own_formula(qwen2: Path, tmp_path: Path) -> None:
    """q, k and v of this base have biases, which are not part of what DoRA scales."""
    dora = save_adapter(tmp_path / "dora", qwen2, use_dora=True, target_modules="all-linear")
    trace = record_peft(dora, qwen2, tmp_path / "run")
    ledger = ledger_of(trace)
    assert ledger.count("took effect") == 7 * LAYERS
    assert {row.stations["agrees"].value for row in ledger.rows} == {"ok"}
    (agree,) = (event for event in trace.events if event.stage == "agree")
    assert 0 < max(error for error, *_ in agree.facts["errors"].values()) < 1e-5


@pytest.mark.parametrize("lora_dtype", ["auto", "bfloat16"])
def test_bfloat16(adapter: Path, llama: Path, tmp_path: Path, lora_dtype: str) -> None:
    options = {"dtype": "bfloat16", "lora_dtype": lora_dtype}
    trace = record_peft(adapter, llama, tmp_path / "run", options=options)
    assert headline(ledger_of(trace)) == f"{MODULES} of {MODULES} modules took effect"
    assert trace.processes[0].process.dtype == "bfloat16"


def test_qwen2_with_biases_and_all_projections(qwen2: Path, tmp_path: Path) -> None:
    wide = save_adapter(tmp_path / "wide", qwen2, target_modules="all-linear")
    trace = record_peft(wide, qwen2, tmp_path / "run", keep="tensors")
    assert headline(ledger_of(trace)) == f"{7 * LAYERS} of {7 * LAYERS} modules took effect"
    assert [len(table) for table in (trace.rows.x, trace.rows.base, trace.rows.delta)] == [7 * LAYERS] * 3


def test_chat_prompts_go_through_the_template(adapter: Path, llama: Path, tmp_path: Path) -> None:
    trace = record_peft(adapter, llama, tmp_path / "run", chat=True, prompts=("hi",))
    assert len(trace.requests[0].prompt_ids) == len("<user>hi<reply>")


def test_the_worst_of_the_recomputed_modules_is_named_after_the_error(peft_trace: Any) -> None:
    (event,) = [event for event in peft_trace.events if event.stage == "agree"]
    assert event.module == ""
    assert re.fullmatch(
        r"recomputed \d+ modules from the file: worst relative error [\d.e-]+, layer \d \w+", event.text
    )


def test_a_forced_continuation_begins_the_answer(adapter: Path, llama: Path, tmp_path: Path) -> None:
    free = record_peft(adapter, llama, tmp_path / "free", prompts=("hi",))
    answer = free.requests[1].output_ids
    same = record_peft(adapter, llama, tmp_path / "same", prompts=("hi",), continuation=[answer[:-1]], max_tokens=1)
    assert same.requests[1].output_ids == answer
    np.testing.assert_allclose(same.requests[1].logprobs, free.requests[1].logprobs, atol=1e-5)
    assert compare(free, same).verdict == "agree"
    record = same.requests[1]
    assert record.text.startswith(record.forced_text)
    assert record.generated_text
    assert [record.forced_text for record in free.requests] == [None, None]
    other = record_peft(adapter, llama, tmp_path / "other", prompts=("hi",), continuation=[[70, 71, 72]])
    assert other.requests[1].output_ids[:3] == [70, 71, 72]
    assert len(other.requests[1].output_ids) == len(other.requests[1].logprobs) == 3 + 6


def test_what_it_cannot_run(adapter: Path, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="cannot load the base model"):
        record_peft(adapter, tmp_path, tmp_path / "a")
    with pytest.raises(ProbeError, match="accepts no engine flags"):
        trace(adapter, engine="peft", out=tmp_path / "b", engine_args=["--seed", "1"])
    assert not (tmp_path / "b").exists()
    with pytest.raises(ProbeError, match="has no tokens"):
        record_peft(adapter, llama, tmp_path / "c", prompts=("",))


def test_a_trace_agrees_with_itself(peft_trace: Any) -> None:
    found = compare(peft_trace, peft_trace)
    assert found.verdict == "agree"
    assert {diff.error for diff in found.modules} == {0.0}


def test_a_scaling_that_is_one_percent_off_is_found(
    adapter: Path, llama: Path, tmp_path: Path, peft_trace: Any
) -> None:
    other = edited(
        adapter, tmp_path / "a", config=lambda c: c | {"alpha_pattern": {"layers.1.self_attn.k_proj": 16.16}}
    )
    found = compare(peft_trace, record_peft(other, llama, tmp_path / "run"))
    assert found.verdict == "differ"
    (damaged,) = [d for d in found.modules if d.module == "model.layers.1.self_attn.k_proj"]
    assert damaged.status == "differs"
    assert damaged.error == pytest.approx(0.01, rel=0.02)
    assert found.first is not None
    assert found.first.key[0] == "model.layers.1.self_attn.k_proj"
    assert (found.first.prompt, found.first.position) == (0, 0)


def test_runs_part_where_their_tokens_part(adapter: Path, llama: Path, tmp_path: Path, peft_trace: Any) -> None:
    other = save_adapter(tmp_path / "a", llama, seed=9)
    second = record_peft(other, llama, tmp_path / "run")
    found = compare(peft_trace, second)
    assert found.verdict == "differ"
    prompts = sum(len(r.prompt_ids) for r in second.requests if r.adapter)
    assert found.rows == prompts + sum(r.same_tokens for r in found.requests)
    assert all(not request.equal for request in found.requests)


def test_a_module_that_only_one_run_has(adapter: Path, llama: Path, tmp_path: Path, peft_trace: Any) -> None:
    less = save_adapter(tmp_path / "a", llama, target_modules=["q_proj", "k_proj"])
    found = compare(peft_trace, record_peft(less, llama, tmp_path / "run"))
    assert {d.status for d in found.modules if d.module.endswith("v_proj")} == {"only in reference"}


def test_levels_without_shrink_compare_norms(adapter: Path, llama: Path, tmp_path: Path, peft_trace: Any) -> None:
    low = record_peft(adapter, llama, tmp_path / "run", keep="norms")
    found = compare(peft_trace, low)
    assert not any(diff.exact for diff in found.modules)
    assert found.verdict == "agree"
    events = record_peft(adapter, llama, tmp_path / "events", keep="events")
    found = compare(peft_trace, events)
    assert found.rows == 0
    assert found.verdict == "undecided"
    assert any("contains no rows" in note for note in found.notes)


def test_nothing_in_common(adapter: Path, llama: Path, tmp_path: Path, peft_trace: Any) -> None:
    different = record_peft(adapter, llama, tmp_path / "run", prompts=("Another one", *PROMPTS[:0]))
    with pytest.raises(ProbeError, match="no prompt in common"):
        compare(peft_trace, different)


def test_prompts_are_matched_by_their_tokens(adapter: Path, llama: Path, tmp_path: Path, peft_trace: Any) -> None:
    turned = record_peft(adapter, llama, tmp_path / "run", prompts=("A third", *reversed(PROMPTS)))
    found = compare(peft_trace, turned)
    assert found.verdict == "agree"
    assert len(found.requests) == 2


def spoiled(trace: Any, spoil: Any) -> Any:
    """The trace with other rows, as if it had been read with them."""
    rows = trace.rows
    changed = {name: getattr(rows, name).copy() for name in ("shrink", "delta_norm")}
    spoil(changed["shrink"], changed["delta_norm"])
    copy = replace(trace)
    vars(copy)["rows"] = replace(rows, **changed)
    return copy


def test_numbers_that_are_none_in_one_run_differ(peft_trace: Any) -> None:
    def spoil(shrink: Any, norms: Any) -> None:
        shrink[5:, 4] = np.nan
        norms[5:, 4] = np.nan

    found = compare(peft_trace, spoiled(peft_trace, spoil))
    assert found.verdict == "differ"
    (bad,) = [diff for diff in found.modules if diff.status != "ok"]
    assert bad.key == peft_trace.rows.modules[4]
    assert found.first is not None
    assert found.first.key == bad.key


def test_a_single_row_without_its_contribution_differs(peft_trace: Any) -> None:
    def spoil(shrink: Any, norms: Any) -> None:
        shrink[7, 2] = 0
        norms[7, 2] = 0

    found = compare(peft_trace, spoiled(peft_trace, spoil), rtol=0.0625)
    assert found.verdict == "differ"
    assert found.first is not None
    assert found.first.key == peft_trace.rows.modules[2]


@pytest.mark.parametrize(("dtype", "lora_dtype"), [("bfloat16", "float32"), ("bfloat16", "float16")])
def test_an_adapter_in_another_dtype_than_its_base(
    adapter: Path, llama: Path, tmp_path: Path, dtype: str, lora_dtype: str
) -> None:
    trace = record_peft(adapter, llama, tmp_path / "run", options={"dtype": dtype, "lora_dtype": lora_dtype})
    assert headline(ledger_of(trace)) == f"{MODULES} of {MODULES} modules took effect"
    assert trace.processes[0].process.lora_dtype == lora_dtype


def test_keys_without_the_prefix_are_dropped_by_peft(adapter: Path, llama: Path, tmp_path: Path) -> None:
    bare = edited(adapter, tmp_path / "a", lambda t: {n.removeprefix("base_model.model."): v for n, v in t.items()})
    ledger = ledger_of(record_peft(bare, llama, tmp_path / "run"))
    assert headline(ledger).startswith(f"0 of {MODULES} modules took effect, {MODULES} lost at read: ")
    assert {row.decisive[1].code for row in ledger.rows if row.decisive} == {"LP503"}


def test_a_bias_on_b_is_part_of_the_contribution(qwen2: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    made = save_adapter(tmp_path / "bias", qwen2, lora_bias=True)
    tensors = load_file(made / "adapter_model.safetensors")
    changed = {n: torch.ones_like(t) if n.endswith("bias") else t for n, t in tensors.items()}
    save_file(changed, made / "adapter_model.safetensors")
    ledger = ledger_of(record_peft(made, qwen2, tmp_path / "run"))
    assert ledger.count("took effect") == MODULES
    assert ledger.healthy


def test_an_adapter_called_like_a_method_of_torch(adapter: Path, llama: Path, tmp_path: Path) -> None:
    assert ledger_of(record_peft(edited(adapter, tmp_path / "train"), llama, tmp_path / "run")).healthy


def test_conv1d_bases(tmp_path: Path) -> None:
    """GPT-2: transposed weights, and a prefix that the checkpoint's names lack."""
    import torch
    from conftest import save_tokenizer
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 288, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 256}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256)).save_pretrained(tmp_path / "gpt2")
    save_tokenizer(tmp_path / "gpt2")
    made = save_adapter(tmp_path / "a", tmp_path / "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    ledger = ledger_of(record_peft(made, tmp_path / "gpt2", tmp_path / "run"))
    assert headline(ledger) == "2 of 2 modules took effect"


def test_few_rows_in_bfloat16_are_not_judged_by_a_ratio(llama: Path, tmp_path: Path) -> None:
    for seed in range(4):
        made = save_adapter(tmp_path / f"a{seed}", llama, seed=seed, r=1, lora_alpha=2)
        options = {"dtype": "bfloat16", "lora_dtype": "bfloat16"}
        trace = record_peft(made, llama, tmp_path / f"run{seed}", options=options, prompts=("h",), max_tokens=1)
        assert ledger_of(trace).count("wrong") == 0
