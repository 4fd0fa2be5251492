"""Rules that the tiny Llama and its engine cannot show: other base models, other flags, files that are not an adapter,
and files next to an adapter. If the result depends on an engine, the engine runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, SharedEngine, edited, record_peft, save_adapter, save_base
from failures import write_config
from merges import save_adapter_of
from other_engine import record_all
from test_predictions import LIMIT, assert_predicted, errors
from written import write_base

from lora_probe import check
from lora_probe.checking.check import fix_for
from lora_probe.errors import ProbeError
from lora_probe.rules import all_rules


def codes(report: Any) -> set[str]:
    return {one.code for one in report.diagnostics}


# experts


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / "moe", "moe")


@pytest.fixture(scope="session")
def on_experts(moe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("on-experts")
    made = {
        "attention": save_adapter(folder / "attention", moe),
        "all-linear": save_adapter(folder / "all-linear", moe, target_modules="all-linear"),
    }
    targets = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    made["each"] = edited(made["attention"], folder / "each", _experts, lambda raw: raw | {"target_modules": targets})
    made["one-missing"] = edited(
        made["each"], folder / "one-missing", lambda ts: {n: t for n, t in ts.items() if ".experts.3." not in n}
    )
    return made


def _experts(tensors: dict[str, Any]) -> dict[str, Any]:
    """A pair for every projection of every expert, as trainers that wrap each expert save them."""
    import torch

    sizes = {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}
    found = dict(tensors)
    for layer in range(LAYERS):
        for expert in range(4):
            for name, (out, wide) in sizes.items():
                path = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}"
                found[f"{path}.lora_A.weight"] = torch.randn(8, wide) * 0.05
                found[f"{path}.lora_B.weight"] = torch.randn(out, 8) * 0.05
    return found


@pytest.mark.engine
def test_experts_do_in_vllm_what_was_predicted(on_experts: dict[str, Path], moe: Path, tmp_path: Path) -> None:
    # The CPU build of vLLM loads experts, and cannot run them with adapters.
    traces = record_all(moe, on_experts, tmp_path / "out", prompts=())
    expected = {"attention": set(), "all-linear": {"LP310"}, "each": set(), "one-missing": {"LP309"}}
    for name, folder in on_experts.items():
        report = check(folder, model=str(moe), options=LIMIT)
        assert errors(report) == expected[name], name
        assert_predicted(report.ledgers["vllm"], traces[name])


def test_peft_adapts_experts_as_predicted(on_experts: dict[str, Path], moe: Path, tmp_path: Path) -> None:
    for name in ("attention", "all-linear"):
        report = check(on_experts[name], model=str(moe))
        assert report.ledgers["peft"].healthy
        assert_predicted(report.ledgers["peft"], record_peft(on_experts[name], moe, tmp_path / name, max_tokens=1))


# a class without embeddings, and a filter


@pytest.mark.engine
def test_qwen2_refuses_a_head_that_llama_takes(qwen2: Path, tmp_path: Path) -> None:
    adapters = {
        "head": save_adapter(tmp_path / "head", qwen2, target_modules=["q_proj", "lm_head"]),
        "all-linear": save_adapter(tmp_path / "all-linear", qwen2, target_modules="all-linear"),
    }
    traces = record_all(qwen2, adapters, tmp_path / "out")
    for name, expected in (("head", {"LP306"}), ("all-linear", set())):
        report = check(adapters[name], model=str(qwen2), options=LIMIT)
        assert errors(report) == expected
        assert_predicted(report.ledgers["vllm"], traces[name])
        assert report.ledgers["peft"].healthy


@pytest.mark.engine
def test_a_filter_of_the_deployment_drops_modules(adapter: Path, llama: Path, tmp_path: Path) -> None:
    trace = record_all(llama, {"a": adapter}, tmp_path / "out", lora_target_modules=["o_proj"])["a"]
    report = check(adapter, model=str(llama), options=LIMIT | {"lora_target_modules": ["o_proj"]})
    assert errors(report) == {"LP404"}
    assert report.ledgers["vllm"].count("lost") == 3 * LAYERS
    assert_predicted(report.ledgers["vllm"], trace)
    # One named part of a packed layer wraps all of it.
    assert not errors(check(adapter, model=str(llama), options={"lora_target_modules": ["k_proj"]}))


@pytest.mark.engine
def test_a_trained_head_on_a_language_model(engine: SharedEngine, llama: Path, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    torch.manual_seed(0)
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    peft_model.save_pretrained(tmp_path / "a")
    report = check(tmp_path / "a", model=str(llama), options=LIMIT, engines=["peft", "vllm"])
    assert errors(report) == {"LP409"}
    assert report.ledgers["peft"].healthy
    assert_predicted(report.ledgers["vllm"], engine.record(tmp_path / "a", tmp_path / "t", prompts=("Hi",)))


# files that are no adapter


def _truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _moved(folder: Path) -> None:
    (folder / "default").mkdir()
    (folder / "adapter_model.safetensors").rename(folder / "default" / "adapter_model.safetensors")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2175168\n"

BROKEN: dict[str, tuple[str, Callable[[Path], object]]] = {
    "A03-truncated": ("LP208", _truncated),
    "A04-pointer": ("LP208", lambda f: (f / "adapter_model.safetensors").write_text(POINTER)),
    "A04-pointer-in-place-of-config": ("LP101", lambda f: (f / "adapter_config.json").write_text(POINTER)),
    "empty-file": ("LP208", lambda f: (f / "adapter_model.safetensors").write_bytes(b"")),
    "A11-sub-folder": ("LP207", _moved),
    "A11-shards": (
        "LP207",
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model-00001-of-00002.safetensors"),
    ),
    "A11-download": ("LP207", lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model (5).safetensors")),
    "A11-no-config": ("LP101", lambda f: (f / "adapter_config.json").unlink()),
    "config-not-json": ("LP101", lambda f: (f / "adapter_config.json").write_text('{"r": 8,')),
    "config-of-text": ("LP101", lambda f: write_config(f, json.loads(_config(f)) | {"r": "8"})),
    "config-null-alpha": ("LP101", lambda f: write_config(f, json.loads(_config(f)) | {"lora_alpha": None})),
    "mlx": ("LP102", lambda f: write_config(f, {"fine_tune_type": "lora", "lora_parameters": {"rank": 8}})),
}


def _config(folder: Path) -> str:
    return (folder / "adapter_config.json").read_text()


@pytest.mark.engine
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_findings_and_no_engine_loads_them(
    name: str, adapter: Path, llama: Path, engine: SharedEngine, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    code, damage = BROKEN[name]
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    damage(folder)
    report = check(folder, model=str(llama))
    assert [one.code for one in report.diagnostics] == [code]
    assert report.diagnostics[0].path is not None
    assert all(ledger.refused for ledger in report.ledgers.values())
    # Each damage has an exception of its own.
    with pytest.raises(Exception):  # noqa: B017, PT011
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder)
    number = next(engine.numbers)
    with pytest.raises(Exception):  # noqa: B017, PT011
        engine.llm.llm_engine.add_lora(LoRARequest("broken", number, str(folder)))


# what stands beside an adapter, and the base


def test_a_quantised_base_that_is_served_otherwise_is_named(adapter: Path, llama: Path, tmp_path: Path) -> None:
    named = edited(
        adapter, tmp_path / "a", config=lambda raw: raw | {"base_model_name_or_path": "unsloth/tiny-Instruct-bnb-4bit"}
    )
    report = check(named, model=str(llama))
    assert [(one.code, one.severity) for one in report.diagnostics] == [("LP313", "warning"), ("LP318", "info")]
    assert "bnb-4bit" in report.diagnostics[0].message
    line = report.diagnostics[0].line
    assert line is not None
    assert "base_model_name_or_path" in _config(named).splitlines()[line - 1] or line == 1
    assert codes(check(named)) == {"LP314"}


def test_what_a_base_says_of_itself(adapter: Path, llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    more = {"_name_or_path": "meta/tiny-base", "attention_k_eq_v": True, "num_kv_shared_layers": 1}
    (base / "config.json").write_text(json.dumps(config | more))
    named = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"base_model_name_or_path": "meta/tiny-chat"})
    report = check(named, model=str(base))
    assert {(one.code, one.severity) for one in report.diagnostics} == {
        ("LP311", "warning"),
        ("LP312", "warning"),
        ("LP316", "info"),
    }
    same = edited(adapter, tmp_path / "b", config=lambda raw: raw | {"base_model_name_or_path": "me/tiny-base"})
    assert codes(check(same, model=str(base))) == {"LP311", "LP316"}


def test_another_chat_template_is_named(adapter: Path, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    template = (llama / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template)
    assert codes(check(folder, model=str(llama))) == set()
    (folder / "chat_template.jinja").write_text(template + "{{ 'more' }}")
    assert codes(check(folder, model=str(llama))) == {"LP315"}


def test_another_step_than_the_best_is_named(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "checkpoint-500"))
    state = {"best_model_checkpoint": "out/checkpoint-200", "global_step": 500, "max_steps": 500}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    assert codes(check(folder)) == {"LP218"}
    (folder / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": "out/checkpoint-500"}))
    assert codes(check(folder)) == set()


def test_a_gap_is_named_where_no_base_is_known(llama: Path, tmp_path: Path) -> None:
    base = save_base(tmp_path / "deep", layers=8)
    saved = save_adapter(tmp_path / "saved", base)
    whole = edited(saved, tmp_path / "whole", config=lambda raw: raw | {"base_model_name_or_path": None})
    holed = edited(whole, tmp_path / "holed", lambda ts: {n: t for n, t in ts.items() if "layers.3" not in n})
    assert codes(check(whole)) == set()
    assert codes(check(holed)) == {"LP217"}
    every_other = edited(whole, tmp_path / "other", lambda ts: {n: t for n, t in ts.items() if _layer(n) % 2 == 0})
    assert codes(check(every_other)) == set()


def _layer(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def test_flags_that_do_not_go_together(adapter: Path, llama: Path) -> None:
    assert codes(check(adapter, model=str(llama), options={"dtype": "float32"})) == {"LP405"}
    assert codes(check(adapter, model=str(llama), options={"dtype": "float16", "lora_dtype": "bfloat16"})) == {"LP405"}
    assert codes(check(adapter, model=str(llama), options={"dtype": "bfloat16"})) == set()


def test_a_rank_above_the_default_is_a_note_and_above_the_flag_an_error(llama: Path, tmp_path: Path) -> None:
    high = save_adapter(tmp_path / "a", llama, r=32)
    report = check(high, model=str(llama))
    assert [(one.code, one.severity) for one in report.diagnostics] == [("LP403", "warning")]
    assert report.ledgers["vllm"].healthy
    assert codes(check(high, model=str(llama), options={"max_lora_rank": 32})) == set()
    assert codes(check(high, model=str(llama), options={"max_lora_rank": 16})) == {"LP402"}


# versions, and the choice of rules


def test_old_versions_ignore_what_new_ones_honour_or_refuse(llama: Path, tmp_path: Path) -> None:
    patterns = save_adapter(tmp_path / "patterns", llama, alpha_pattern={"v_proj": 32})
    for version, expected in (("0.31", {"LP407"}), ("0.30.0", {"LP407"}), ("0.32", set()), ("0.40", set())):
        report = check(patterns, model=str(llama), vllm_version=version)
        assert codes(report) == expected, version
        assert report.ledgers["vllm"].count("wrong") == (LAYERS if expected else 0)
        assert report.ledgers["peft"].healthy
    pissa = save_adapter(tmp_path / "pissa", llama, init_lora_weights="pissa")
    assert codes(check(pissa, model=str(llama), vllm_version="0.31")) == {"LP407"}
    assert codes(check(pissa, model=str(llama), vllm_version="0.33")) == {"LP406"}


@pytest.mark.parametrize("version", ["0.29", "new", "0"])
def test_a_version_that_nobody_knows_is_refused(version: str, adapter: Path) -> None:
    with pytest.raises(ProbeError, match=r"known|older|version"):
        check(adapter, vllm_version=version)


def test_rules_are_chosen_by_code_beginning_and_name(adapter: Path, llama: Path, tmp_path: Path) -> None:
    both = edited(
        adapter,
        tmp_path / "a",
        lambda ts: {n: t for n, t in ts.items() if "layers.1" not in n},
        lambda raw: raw | {"use_dora": True},
    )
    assert codes(check(both, model=str(llama))) == {"LP204", "LP220"}
    assert codes(check(both, model=str(llama), select=["LP2"])) == {"LP204", "LP220"}
    assert codes(check(both, model=str(llama), select=["lp2xx", "variant-refused"], ignore=["LP220"])) == {
        "LP204",
        "LP406",
    }
    with pytest.raises(ProbeError, match="no rule"):
        check(both, select=["LP9"])


def test_rules_without_a_base_are_not_run_and_not_passed(adapter: Path, tmp_path: Path) -> None:
    nameless = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"base_model_name_or_path": None})
    report = check(nameless)
    not_run = {code for one in report.not_run for code in one.codes}
    needing = {code for code, rule in all_rules().items() if rule.needs != "files" and code < "LP5"}
    assert not_run == needing
    assert all(ledger.count("unknown") == len(ledger.rows) for ledger in report.ledgers.values())


def test_no_rule_speaks_of_what_peft_makes(tmp_path: Path) -> None:
    for kind in ("tied", "qwen2"):
        base = write_base(tmp_path / kind, kind)
        made = save_adapter_of(tmp_path / f"{kind}-a", base, target_modules="all-linear")
        report = check(made, model=str(base))
        assert codes(report) == set(), [one.message for one in report.diagnostics]
        assert report.ledgers["peft"].healthy


def test_a_class_that_takes_no_adapters(tmp_path: Path) -> None:
    base = write_base(tmp_path / "gpt2", "gpt2")
    made = save_adapter_of(tmp_path / "a", base, target_modules=["c_attn"])
    report = check(made, model=str(base), engines=["peft", "vllm"])
    assert errors(report) == {"LP411"}
    assert report.ledgers["vllm"].refused
    assert report.ledgers["peft"].healthy


def test_a_vocabulary_beyond_vllms_limit(adapter: Path, llama: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "big", "large")
    report = check(adapter, model=str(base))
    assert errors(report) == {"LP408"}
    assert report.ledgers["vllm"].refused


def test_biases_of_the_base_with_and_without_the_flag(qwen2: Path, tmp_path: Path) -> None:
    trained = save_adapter(tmp_path / "a", qwen2, bias="all")
    assert errors(check(trained, model=str(qwen2))) == {"LP406"}
    unsaid = edited(trained, tmp_path / "b", config=lambda raw: raw | {"bias": "none"})
    report = check(unsaid, model=str(qwen2))
    assert errors(report) == {"LP211"}
    assert "in place of the base" in next(one.message for one in report.diagnostics if one.code == "LP211")


def test_a_variant_of_which_vllm_reads_nothing(llama: Path, tmp_path: Path) -> None:
    from peft import KasaConfig

    whole = save_adapter(tmp_path / "a", llama, kasa_config=KasaConfig())
    assert errors(check(whole, model=str(llama))) == {"LP110"}
    stripped = edited(whole, tmp_path / "b", lambda ts: {n: t for n, t in ts.items() if "lora_diag" not in n})
    assert "LP110" in errors(check(stripped, model=str(llama)))
    assert errors(check(stripped, model=str(llama), ignore=["LP110"])) == {"LP220"}


def test_patterns_and_targets_that_match_nothing(adapter: Path, llama: Path, tmp_path: Path) -> None:
    typo = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"alpha_pattern": {"q_porj": 32}})
    for report in (check(typo, model=str(llama)), check(typo)):
        assert [(one.code, one.severity) for one in report.diagnostics] == [("LP105", "warning")]
    more = edited(
        adapter, tmp_path / "b", config=lambda raw: raw | {"target_modules": ["q_proj", "k_proj", "v_proj", "query"]}
    )
    report = check(more, model=str(llama))
    assert [(one.code, one.severity) for one in report.diagnostics] == [("LP108", "info")]


def test_a_target_that_peft_cannot_adapt(adapter: Path, llama: Path, tmp_path: Path) -> None:
    block = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"target_modules": ["q_proj", "self_attn"]})
    report = check(block, model=str(llama))
    assert "LP307" in errors(report)
    trace = record_peft(block, llama, tmp_path / "t", prompts=("Hi",), max_tokens=1)
    assert_predicted(report.ledgers["peft"], trace)


def test_a_key_that_stands_twice(adapter: Path, llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "a"))
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("{", '{\n  "lora_alpha": 4,', 1))
    report = check(folder, model=str(llama))
    assert [(one.code, one.severity) for one in report.diagnostics] == [("LP104", "warning")]
    assert "lora_alpha" in path.read_text().splitlines()[(report.diagnostics[0].line or 0) - 1]


# a multimodal model


@pytest.fixture(scope="session")
def on_multimodal(paligemma: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("on-multimodal")
    targets = {
        "language": r".*language_model.*\.[qkv]_proj",
        "towers": r".*\.([qkv]_proj|fc1)",
        "all-linear": "all-linear",
    }
    made = {}
    for name, modules in targets.items():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(paligemma))
        peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=modules))
        for parameter, values in peft_model.named_parameters():
            if "lora_B" in parameter:
                torch.nn.init.normal_(values, std=0.05)
        peft_model.save_pretrained(folder / name)
        made[name] = folder / name
    text = {"target_modules": ["q_proj", "k_proj", "v_proj"]}
    rename = lambda ts: {n.replace("model.language_model.layers", "model.layers"): t for n, t in ts.items()}  # noqa: E731
    made["text"] = edited(made["language"], folder / "text", rename, lambda raw: raw | text)
    return made


def test_names_on_a_multimodal_model(on_multimodal: dict[str, Path], paligemma: Path) -> None:
    healthy = check(on_multimodal["language"], model=str(paligemma))
    assert codes(healthy) == set(), [one.message for one in healthy.diagnostics]
    assert all(ledger.healthy for ledger in healthy.ledgers.values())
    text = check(on_multimodal["text"], model=str(paligemma))
    assert "LP302" in errors(text)
    assert all(ledger.count("took effect") == 0 for ledger in text.ledgers.values())
    # The vision tower has layers of the same numbers and projections: the file's beginning is decided once for all.
    (said,) = [one for one in text.diagnostics if one.code == "LP302"]
    assert len(said.modules) == 3 * LAYERS
    fix = fix_for(on_multimodal["text"], str(paligemma))
    assert len(fix.renamed) == 6 * LAYERS
    assert all("model.language_model.layers" in new for new in fix.renamed.values())
    newer = check(on_multimodal["text"], model=str(paligemma), vllm_version="0.33")
    assert newer.ledgers["vllm"].count("took effect") == 3 * LAYERS
    assert errors(newer) == {"LP204", "LP302"}


def test_a_tower_that_vllm_does_not_adapt(on_multimodal: dict[str, Path], paligemma: Path, tmp_path: Path) -> None:
    # The projector's `linear` is a word that vLLM's class does not take at all.
    assert errors(check(on_multimodal["all-linear"], model=str(paligemma))) == {"LP306"}
    # Transformers 5 has another name for the tower's modules than vLLM 0.32, and before it had the same.
    new = check(on_multimodal["towers"], model=str(paligemma))
    assert errors(new) == {"LP303"}
    assert new.ledgers["peft"].healthy
    old = edited(
        on_multimodal["towers"],
        tmp_path / "old",
        lambda ts: {n.replace("vision_tower.encoder", "vision_tower.vision_model.encoder"): t for n, t in ts.items()},
    )
    report = check(old, model=str(paligemma))
    for found in (new, report):
        lost = [row.module for row in found.ledgers["vllm"].rows if row.fate == "lost"]
        assert lost
        assert all("vision" in module for module in lost)
    assert "LP304" in errors(report)


@pytest.mark.slow
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expression_without_an_end_is_a_finding(field: str, adapter: Path, llama: Path, tmp_path: Path) -> None:
    endless = r"(?:[a-z]+|\w+|[\w.]+)+[A-Z]"
    report = check(edited(adapter, tmp_path / "a", config=lambda raw: raw | {field: endless}), model=str(llama))
    assert codes(report) == {"LP101"}
    assert "takes more than 1 s on one module name" in report.diagnostics[0].message


@pytest.mark.parametrize("options", [{"max_lora_rank": 17}, {"max_lora_rank": 0}, {"max_lora_rnk": 16}])
def test_options_that_vllm_does_not_take(options: dict[str, Any], adapter: Path) -> None:
    with pytest.raises(ProbeError, match="vLLM"):
        check(adapter, options=options)


def test_a_field_that_vllm_never_reads_is_pefts_alone(adapter: Path, llama: Path, tmp_path: Path) -> None:
    broken = edited(adapter, tmp_path / "a", config=lambda raw: raw | {"target_modules": "(q_proj"})
    report = check(broken, model=str(llama))
    assert [(one.code, one.engines) for one in report.diagnostics] == [("LP101", ("peft",))]
    assert report.ledgers.keys() == {"peft"}
    trace = record_peft_refusal(broken, llama)
    assert "missing" in trace or "unterminated" in trace


def record_peft_refusal(adapter: Path, base: Path) -> str:
    """PEFT's own message about an adapter that lora-probe cannot open."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with pytest.raises(Exception) as caught:  # noqa: PT011
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return str(caught.value)


def test_a_pattern_for_every_module_is_quick_and_right(llama: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in ("q_proj", "k_proj")]
    made = save_adapter(tmp_path / "a", llama, rank_pattern=dict.fromkeys(names, 4))
    report = check(made, model=str(llama))
    assert report.diagnostics == ()
    assert all(ledger.healthy for ledger in report.ledgers.values())
