"""Short names of modules: as short as they can be, and no two alike."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from written import edited, write_adapter, write_base

from lora_probe import check
from lora_probe.ledger import OK, STATIONS, Finding, Ledger, Row, headline
from lora_probe.names import Universe, name_modules, path_of, projection_of

N = range(3)
FUSED = [path_of((f"model.layers.{n}.mlp.experts", p, e)) for n in N for p in ("gate_up_proj", "down_proj") for e in N]
LLAMA = [f"model.layers.{n}.self_attn.{p}_proj" for n in N for p in "qkv"]
BERT = [
    f"bert.encoder.layer.{n}.{p}"
    for n in N
    for p in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
]
WHISPER = [
    f"model.{tower}.layers.{n}.{p}"
    for tower, own in (("encoder", ()), ("decoder", ("encoder_attn.q_proj",)))
    for n in N
    for p in ("self_attn.q_proj", *own, "fc1")
]
T5 = [f"encoder.block.{n}.layer.{i}.{p}" for n in N for i, p in enumerate(("SelfAttention.q", "DenseReluDense.wo"))] + [
    f"decoder.block.{n}.layer.{i}.{p}" for n in N for i, p in enumerate(("SelfAttention.q", "EncDecAttention.q"))
]
GPT2 = [f"transformer.h.{n}.{p}" for n in N for p in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")]
UNET = [
    f"{block}.attentions.{a}.transformer_blocks.0.{p}"
    for block, a in [*product(("down_blocks.0", "down_blocks.1", "up_blocks.1"), (0, 1)), ("mid_block", 0)]
    for p in ("attn1.to_q", "attn2.to_q", "attn1.to_out.0", "ff.net.2")
]
MOE = [
    f"model.layers.{n}.{p}"
    for n in N
    for p in (
        "self_attn.q_proj",
        "mlp.shared_expert.up_proj",
        *(f"mlp.experts.{e}.{p}_proj" for e in range(8) for p in ("gate", "up")),
    )
]
RENAMED = [f"model.layers.{n}.{word}.q_proj" for n in N for word in ("self_attn", "attention")]
PREFIXED = [f"{prefix}.layers.{n}.q_proj" for n in N for prefix in ("model", "model.model", "transformer")]
PALIGEMMA = [
    f"model.{tower}.layers.{n}.self_attn.q_proj"
    for tower in ("language_model", "vision_tower.vision_model.encoder")
    for n in N
]
ODD = ["0.q", "layers.0.q", "layers.00.q", "layers.0.0.q", "layers.0.q.0", "x.layers.0.0", "q", "", ".", "0.0.0.0.0.0"]
DEEP = [f"{'a.0.' * depth}q" for depth in range(30)] + [f"layers.0.{'b.' * depth}q" for depth in range(30)]
EXPERTS = [f"layers.0.{block}.experts.{e}.up" for block in "ab" for e in range(2)]
FAMILIES = [LLAMA, BERT, WHISPER, T5, GPT2, UNET, MOE, RENAMED, PREFIXED, PALIGEMMA, ODD, DEEP, EXPERTS, FUSED]


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ([*LLAMA, "lm_head"], "layers 0-2 q_proj, k_proj, v_proj; lm_head"),
        (BERT, "layers 0-2 query, attention.output.dense, intermediate.dense, output.dense"),
        (
            WHISPER,
            "encoder layers 0-2 q_proj, fc1; decoder layers 0-2 self_attn.q_proj, encoder_attn.q_proj, fc1",
        ),
        (T5, "encoder layers 0-2 q, wo; decoder layers 0-2 SelfAttention.q, EncDecAttention.q"),
        (GPT2, "layers 0-2 c_attn, attn.c_proj, mlp.c_proj"),
        (
            UNET,
            "down_blocks 0-1 attentions 0-1 attn1.to_q, attn2.to_q, to_out.0, net.2; "
            "up_blocks 1 attentions 0-1 attn1.to_q, attn2.to_q, to_out.0, net.2; "
            "mid_block attentions 0 attn1.to_q, attn2.to_q, to_out.0, net.2",
        ),
        (MOE, "layers 0-2 q_proj, shared_expert.up_proj, experts 0-7 gate_proj, up_proj"),
        (PALIGEMMA, "language_model layers 0-2 q_proj; vision_tower layers 0-2 q_proj"),
        (PREFIXED, "model.layers 0-2 q_proj; model.model layers 0-2 q_proj; transformer layers 0-2 q_proj"),
        (EXPERTS, "layer 0 a.experts 0-1 up, b.experts 0-1 up"),
        (FUSED, "layers 0-2 gate_up_proj[0-2], down_proj[0-2]"),
        (
            [path for path in FUSED if path != FUSED[4]],
            "layer 0 gate_up_proj[0-2], down_proj[0, 2]; layers 1-2 gate_up_proj[0-2], down_proj[0-2]",
        ),
        (["layers.0.a[0]", "layers.0.a", "layers.0.a[1]"], "layer 0 a[0-1], a"),
        ([*LLAMA, *LLAMA], "layers 0-2 q_proj, k_proj, v_proj"),
        ([], ""),
    ],
)
def test_many_modules_in_few_words(modules: list[str], text: str) -> None:
    assert name_modules(modules) == text


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_modules_of_a_universe_are_named_alike(family: list[str]) -> None:
    universe = Universe(tuple(family))
    texts = [name_modules([path], universe) for path in family]
    assert len(set(texts)) == len(set(family))


def test_some_modules_are_named_as_no_others_are() -> None:
    def named(part: str, family: list[str]) -> str:
        return name_modules([path for path in family if part in path], Universe(tuple(family)))

    assert named(".attention.", RENAMED) == "layers 0-2 attention.q_proj"
    assert named("self_attn", RENAMED) == "layers 0-2 self_attn.q_proj"
    assert named("decoder.layers.1.self", WHISPER) == "decoder layer 1 self_attn.q_proj"
    assert named("experts.3.up", MOE) == "layers 0-2 experts 3 up_proj"
    assert named("mlp.c_proj", GPT2) == "layers 0-2 mlp.c_proj"
    holes = [path for path in MOE if "experts" in path and "experts.3.up" not in path]
    assert name_modules(holes, Universe(tuple(MOE))) == (
        "layers 0-2 experts 0-2, 4-7 gate_proj, up_proj, experts 3 gate_proj"
    )


def test_a_module_outside_of_the_universe_gets_a_name_of_its_own() -> None:
    assert name_modules(["model.layers.0.other.q_proj"], Universe(tuple(LLAMA))) == "layer 0 other.q_proj"
    assert name_modules(["lm_head"], Universe(tuple(LLAMA))) == "lm_head"


def test_lost_and_healthy_modules_of_a_ledger_are_worded_differently() -> None:
    def row(path: str, finding: Finding = OK) -> Row:
        return Row((path, "weight", None), dict.fromkeys(STATIONS, finding))

    lost = Finding("absent", "LP303", "LlamaForCausalLM has no such module")
    rows = [row(path, lost if ".attention." in path else OK) for path in RENAMED]
    assert headline(Ledger("peft", tuple(rows))) == (
        "3 of 6 modules took effect, 3 lost at stored: layers 0-2 attention.q_proj: "
        "LlamaForCausalLM has no such module (LP303)"
    )
    # The base model has modules that the adapter does not.
    universe = Universe(tuple(RENAMED))
    only = Ledger("peft", (row(RENAMED[0], lost), row(RENAMED[2])), universe=universe)
    assert "layer 0 self_attn.q_proj: " in headline(only)


def test_a_number_is_not_a_projection() -> None:
    names = ("a.0.to_out.0", "a.q_proj", "q_proj", "0", "")
    assert [projection_of(name) for name in names] == ["to_out.0", "q_proj", "q_proj", "0", ""]


def test_parameters_of_one_module_are_told_apart() -> None:
    assert path_of(("mlp.experts", "down_proj", 3)) == "mlp.experts.down_proj[3]"
    lost = Finding("absent", "LP204", "not in the file", predicate=True)
    keys = [("layers.0.mlp.experts", parameter, None) for parameter in ("gate_up_proj", "down_proj")]
    rows = tuple(Row(key, dict.fromkeys(STATIONS, f)) for key, f in zip(keys, (OK, lost), strict=True))
    assert headline(Ledger("peft", rows)).endswith("layer 0 down_proj is not in the file (LP204)")


def test_check_names_modules_as_no_other_module_of_the_base_is_named(tmp_path: Path) -> None:
    """The base has `mlp.c_proj` too, although the adapter has none."""
    base = write_base(tmp_path / "base", "gpt2")
    whole = write_adapter(tmp_path / "a", base, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    hole = edited(whole, tmp_path / "hole", lambda tensors: {n: t for n, t in tensors.items() if ".h.1." not in n})
    report = check(hole, model=str(base), select=["LP204"])
    assert report.diagnostics[0].message == "1 lost at stored: layer 1 attn.c_proj is not in the file"
    assert "layer 1 attn.c_proj is not in the file" in headline(report.ledgers["peft"])
    # All modules: the message does not name them, so that `about` does.
    zero = edited(whole, tmp_path / "zero", lambda tensors: {n: t * 0 for n, t in tensors.items()})
    (diagnostic,) = check(zero, model=str(base), select=["LP203"]).diagnostics
    assert not diagnostic.names_modules
    assert re.fullmatch(r"layers 0-\d attn\.c_proj", diagnostic.about)
