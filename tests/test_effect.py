"""Outputs of merged models compared with unmerged adapters: real merges, real damage, real PEFT, another real vLLM."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PROMPTS, SharedEngine, edited, record_peft, save_adapter

from lora_probe import open_trace
from lora_probe.comparison.effect import as_json, divergence, effect
from lora_probe.engines.launch import Merged, merge, trace_plain
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.precision import floor
from lora_probe.recording import SCHEMA, Process, Score, TraceWriter
from lora_probe.recording.sketch import SKETCH, projection

TOKENS = 6
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("effect")


@pytest.fixture(scope="module")
def unmerged(adapter: Path, llama: Path, home: Path) -> Any:
    return record_peft(adapter, llama, home / "unmerged", score=True, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def merged(adapter: Path, llama: Path, home: Path) -> Merged:
    return merge(adapter, model=str(llama), out=home / "merged")


@pytest.fixture(scope="module")
def plain(merged: Merged, unmerged: Any, home: Path) -> Any:
    return trace_plain(merged.path, engine="peft", follow=unmerged, out=home / "plain.lptrace")


def changed(model: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model with other weights; `change` receives torch tensors by name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def rerun(follow: Any, model: Path, folder: Path) -> Any:
    """The same recording as `trace_plain` in the PEFT engine, in this process."""
    from lora_probe.engines.peft.engine import PeftEngine

    shutil.copytree(follow.path, folder, ignore=shutil.ignore_patterns("peft"))
    spec = json.loads((folder / "run.json").read_text())
    spec["spec"]["model"] = str(model)
    (folder / "run.json").write_text(json.dumps(spec))
    PeftEngine().record(open_trace(folder).run.spec, folder)
    return open_trace(folder)


def test_a_right_merge_keeps_the_effect(unmerged: Any, plain: Any) -> None:
    found = effect(unmerged, plain)
    assert found.tokens == TOKENS * len(PROMPTS)
    assert found.kl_base > 1e-3
    assert found.kl_merged < 1e-11
    assert found.survives > 0.999
    assert (found.top1, found.first_module, found.notes) == (1.0, None, ())
    assert found.base_top1 < 1
    assert found.logprob_error < 1e-5
    assert found.worst_module.error < found.tolerance
    assert [prompt.first_token for prompt in found.prompts] == [None, None]
    assert [prompt.prompt for prompt in found.prompts] == [0, 1]


def test_scores_are_log_probabilities_of_the_answers(unmerged: Any) -> None:
    answers = {request.prompt: request for request in unmerged.requests if request.adapter}
    kinds = [scored.score.kind for scored in unmerged.scores]
    assert kinds == ["adapter"] * 2 + ["base"] * 2
    for scored in unmerged.scores:
        answer, logprobs = answers[scored.score.prompt], scored.logprobs()
        assert scored.score.answer_ids == answer.output_ids
        assert logprobs.shape == (TOKENS, 288)
        np.testing.assert_allclose(np.exp(logprobs).sum(-1), 1, atol=1e-5)
        if scored.score.kind == "adapter":
            assert logprobs.argmax(-1).tolist() == answer.output_ids
            np.testing.assert_allclose(logprobs.max(-1), answer.logprobs, atol=1e-5)


def test_the_base_in_the_merged_place_keeps_nothing(unmerged: Any, plain: Any, llama: Path, tmp_path: Path) -> None:
    found = effect(unmerged, rerun(plain, llama, tmp_path / "run"))
    assert found.survives == pytest.approx(0, abs=1e-3)
    assert found.top1 == found.base_top1 < 1
    assert found.kl_merged == pytest.approx(found.kl_base)
    assert (found.first_module.key[0], found.first_module.position) == ("model.layers.0.self_attn.q_proj", 0)
    first = found.prompts[0].first_token
    assert first.unmerged == unmerged.scores[0].score.answer_ids[first.token] != first.merged


def test_the_first_layer_that_parts_is_named(
    unmerged: Any, plain: Any, merged: Merged, llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    base = load_file(llama / WEIGHTS)
    name = "model.layers.1.self_attn.v_proj.weight"
    damaged = changed(merged.path, tmp_path / "damaged", lambda tensors: tensors.update({name: base[name]}))
    found = effect(unmerged, rerun(plain, damaged, tmp_path / "run"))
    assert found.first_module.key == ("model.layers.1.self_attn.v_proj", "weight", None)
    assert (found.first_module.prompt, found.first_module.position) == (0, 0)
    assert found.first_module.token == -len(PROMPTS[0])
    assert 0 < found.survives < 0.95
    assert as_json(found)["first_module"]["module"] == "model.layers.1.self_attn.v_proj"


def test_nan_is_infinitely_far(unmerged: Any, plain: Any, merged: Merged, tmp_path: Path) -> None:
    broken = changed(
        merged.path, tmp_path / "nan", lambda tensors: tensors["model.layers.2.self_attn.q_proj.weight"].fill_(np.nan)
    )
    found = effect(unmerged, rerun(plain, broken, tmp_path / "run"))
    assert found.kl_merged == np.inf
    assert found.survives == -np.inf
    assert found.top1 == 0
    assert found.prompts[0].first_token.merged is None
    assert found.first_module.key[0] == "model.layers.2.self_attn.q_proj"
    assert any("the merged model contains NaN" in note for note in found.notes)
    plain_values = as_json(found)
    assert plain_values["kl_merged"] is plain_values["survives"] is None
    json.dumps(plain_values, allow_nan=False)


def test_no_hook_is_left_on_a_plain_model(plain: Any, llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from lora_probe.engines.peft import plain as engine

    seen = []
    original = engine.load_model

    def load(*args: Any) -> Any:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(engine, "load_model", load)
    rerun(plain, llama, tmp_path / "run")
    assert not any(module._forward_hooks for module in seen[0].modules())


def test_what_cannot_be_compared(unmerged: Any, plain: Any, adapter: Path, llama: Path, tmp_path: Path) -> None:
    shorter = record_peft(adapter, llama, tmp_path / "shorter", score=True, max_tokens=2)
    with pytest.raises(ProbeError, match="saw different tokens after prompt 1"):
        effect(shorter, plain)
    elsewhere = record_peft(adapter, llama, tmp_path / "else", score=True, prompts=("hi",))
    with pytest.raises(ProbeError, match="no prompt in common"):
        effect(elsewhere, plain)
    unscored = record_peft(adapter, llama, tmp_path / "unscored")
    with pytest.raises(ProbeError, match="no scored answer of an adapter"):
        effect(unscored, plain)
    with pytest.raises(ProbeError, match="no scored answer of a model without an adapter"):
        effect(unmerged, unmerged)
    with pytest.raises(ProbeError, match="to follow"):
        trace_plain(llama, engine="peft", follow=unscored, out=tmp_path / "none")
    with pytest.raises(ProbeError, match="nowhere"):
        trace_plain(tmp_path / "nowhere", engine="peft", follow=unmerged, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_refused_adapter_is_said(plain: Any, adapter: Path, llama: Path, tmp_path: Path) -> None:
    other = edited(adapter, tmp_path / "a", config=lambda config: config | {"r": 4})
    refused = record_peft(other, llama, tmp_path / "run", score=True)
    with pytest.raises(ProbeError, match=r"peft refused it .*size mismatch"):
        effect(refused, plain)


def test_trained_biases_leave_no_base_to_measure_against(llama: Path, tmp_path: Path) -> None:
    biased = save_adapter(tmp_path / "biased", llama, bias="all")
    trace = record_peft(biased, llama, tmp_path / "run", score=True, prompts=("hi",))
    (base,) = [scored for scored in trace.scores if scored.score.kind == "base"]
    assert "bias" in base.score.unmeasured
    assert base.logprobs() is None


def test_what_is_missing_is_said(unmerged: Any, plain: Any, tmp_path: Path) -> None:
    for trace, name in ((unmerged, "unmerged"), (plain, "plain")):
        shutil.copytree(trace.path, tmp_path / name)
    (tmp_path / "plain" / "peft" / "next-000002.safetensors").unlink()
    # A busy machine fills more than one segment.
    for segment in (tmp_path / "unmerged" / "peft").glob("0*.safetensors"):
        segment.unlink()
    found = effect(open_trace(tmp_path / "unmerged"), open_trace(tmp_path / "plain"))
    assert len(found.prompts) == 1
    assert found.first_module is found.worst_module is None
    for text in ("prompt 2 was not run", "contains no outputs of modules", "is incomplete: peft"):
        assert any(text in note for note in found.notes)
    damaged = tmp_path / "plain" / "peft" / "next-000001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ProbeError, match="cannot read"):
        effect(open_trace(tmp_path / "unmerged"), open_trace(tmp_path / "plain"))


def write_scores(folder: Path, **tables: Any) -> Any:
    """A trace with only one scored prompt for each kind."""
    process = Process(SCHEMA, "engine", "peft", 0, 1, {}, dtype="float32")
    with TraceWriter(folder / "peft", process) as writer:
        for kind, table in tables.items():
            count = len(table) if table is not None else 2
            score = Score(kind, 0, kind, [1], list(range(count)), "" if table is not None else "why")  # type: ignore[arg-type]
            writer.score(score, table)
    return open_trace(folder)


def test_divergence_is_that_of_torch_in_float64(tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    p, q, b = (torch.log_softmax(torch.randn(3, 1000) * size, -1) for size in (1, 1.5, 2))
    expected = torch.nn.functional.kl_div(q.double(), p.double(), log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(divergence(p.numpy(), q.numpy()), expected, rtol=1e-4)
    assert divergence(p.numpy(), p.numpy()).max() == 0
    one = write_scores(tmp_path / "one", adapter=p.numpy(), base=b.numpy())
    found = effect(one, write_scores(tmp_path / "two", plain=q.numpy()))
    assert found.survives == pytest.approx(1 - np.sqrt(found.kl_merged / found.kl_base))


def test_no_effect_has_no_share(tmp_path: Path) -> None:
    p = np.log(np.full((2, 4), 0.25, np.float32))
    nudged = p + np.array([1e-6, -1e-6, 0, 0], np.float32)
    found = effect(write_scores(tmp_path / "a", adapter=p, base=nudged), write_scores(tmp_path / "b", plain=p))
    assert 0 < found.kl_base < floor("float32")
    assert found.survives is None


def test_impossible_tokens(tmp_path: Path) -> None:
    p, q = (np.log(np.array([row], np.float32)) for row in ([0.5, 0.5, 1e-30], [1.0, 1e-30, 1e-30]))
    p[0, 2] = q[0, 1] = -np.inf
    assert divergence(p, q).tolist() == [np.inf]
    p[0, 1], q[0, 1] = -np.inf, -0.5
    assert np.isfinite(divergence(p, q)).all()


def test_vocabularies_of_different_sizes(tmp_path: Path) -> None:
    one = write_scores(tmp_path / "a", adapter=np.zeros((2, 8), np.float32))
    with pytest.raises(ProbeError, match=r"8 tokens in .* 9 in "):
        effect(one, write_scores(tmp_path / "b", plain=np.zeros((2, 9), np.float32)))


def test_unmeasured_distributions_give_no_number(tmp_path: Path) -> None:
    one = write_scores(tmp_path / "a", adapter=None, base=None)
    found = effect(one, write_scores(tmp_path / "b", plain=np.zeros((2, 8), np.float32)))
    assert (found.tokens, found.kl_merged, found.survives, found.prompts) == (0, None, None, ())
    assert any("of the unmerged adapter were not measured: why" in note for note in found.notes)


def test_a_trace_from_before_scores_opens(adapter: Path, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    record_peft(adapter, llama, folder)
    for path, inner in ((folder / "run.json", "spec"), (folder / "peft" / "process.json", None)):
        held = json.loads(path.read_text())
        for name in ("score", "watch", "scores"):
            (held[inner] if inner else held).pop(name, None)
        path.write_text(json.dumps(held))
    trace = open_trace(folder)
    assert trace.complete
    assert trace.scores == ()
    assert trace.rows.sketch is None
    assert not trace.run.spec.score


def test_a_sketch_keeps_lengths_and_is_the_same_everywhere() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 128)).astype(np.float32)
    ratios = np.linalg.norm(rows @ projection(128), axis=-1) / np.linalg.norm(rows, axis=-1)
    assert projection(128).shape == (128, SKETCH)
    assert abs(ratios.mean() - 1) < 0.05
    assert ratios.min() > 0.5
    assert hashlib.sha256(projection(128).tobytes()).hexdigest().startswith("afc5adc8744785d7")


def test_merges_that_cannot_be_made(adapter: Path, llama: Path, merged: Merged, tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="exists"):
        merge(adapter, model=str(llama), out=merged.path)
    other = edited(adapter, tmp_path / "a", config=lambda config: config | {"r": 4})
    with pytest.raises(EngineFailed, match=r"PEFT cannot merge .*size mismatch"):
        merge(other, model=str(llama), out=tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert (tmp_path / "m.partial" / "engine.log").exists()


def test_a_merge_is_that_of_peft(adapter: Path, llama: Path, merged: Merged, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(tmp_path / "m")
    mine, theirs = load_file(merged.path / WEIGHTS), load_file(tmp_path / "m" / WEIGHTS)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert (merged.path / "tokenizer.json").exists()
    assert not merged.path.with_name("merged.partial").exists()


@pytest.mark.engine
def test_vllm_unmerged_against_vllm_and_peft_merged(
    engine: SharedEngine, unmerged: Any, plain: Any, merged: Merged, adapter: Path, tmp_path: Path
) -> None:
    theirs = engine.record(adapter, tmp_path / "unmerged", score=True, max_tokens=TOKENS)
    options = {"dtype": "float32", "max_model_len": 256}
    bare = trace_plain(merged.path, engine="vllm", follow=theirs, out=tmp_path / "plain.lptrace", options=options)
    assert bare.complete
    assert theirs.complete
    assert set(bare.rows.modules) == set(theirs.rows.modules)
    # The same tokens, so PEFT's and vLLM's runs can be held against each other as well.
    for one, two in ((theirs, bare), (theirs, plain), (unmerged, bare)):
        found = effect(one, two)
        assert found.survives > 0.999
        assert (found.top1, found.first_module, found.notes) == (1.0, None, ())
        assert found.kl_merged < 1e-10
    scores = {(scored.score.kind, scored.score.prompt): scored.logprobs() for scored in theirs.scores}
    for scored in unmerged.scores:
        np.testing.assert_allclose(scored.logprobs(), scores[(scored.score.kind, scored.score.prompt)], atol=1e-4)


@pytest.mark.engine
def test_vllm_says_where_its_distributions_leave_the_adapter_out(
    engine: SharedEngine, llama: Path, tmp_path: Path
) -> None:
    head = save_adapter(tmp_path / "head", llama, target_modules=["q_proj", "lm_head"])
    trace = engine.record(head, tmp_path / "run", score=True, prompts=("hi",))
    assert {scored.score.unmeasured for scored in trace.scores} == {trace.scores[0].score.unmeasured}
    assert "the adapter of lm_head" in trace.scores[0].score.unmeasured
    assert trace.scores[0].logprobs() is None
