"""The rules on running engines: the station, the value and the sentence of each finding."""

from __future__ import annotations

from typing import Any

import pytest

from lora_probe.ledger import Finding
from lora_probe.rules import all_rules, lp5_loading, lp6_applying, lp6_comparing
from lora_probe.rules.lp4_serving import refused

AFFECTED = lp6_applying.Affected(3, ("cmpl-1",), 1)

CASES: dict[str, tuple[Any, tuple[Any, ...], str, str]] = {
    "LP401": (refused, ("rank 64 is too large",), "absent", "rank 64 is too large"),
    "LP500": (lp5_loading.not_measured, ("no rows",), "unknown", "no rows"),
    "LP501": (lp5_loading.name_without_home, ("a.b", None, "vLLM"), "absent", "vLLM has no module with that name"),
    "LP502": (lp5_loading.no_lora_layer, ("PEFT", "not targeted"), "absent", "PEFT did not create a LoRA layer for it"),
    "LP503": (lp5_loading.not_taken, ("vLLM", "it is skipped"), "absent", "vLLM's loader skipped it"),
    "LP504": (lp5_loading.placed_differs, ("lora_A", 0.5, "at the end"), "wrong", "differs from the file by 0.5"),
    "LP505": (lp5_loading.placed_empty, ("after loading",), "absent", "only zeros after loading"),
    "LP506": (lp5_loading.reloaded, (14,), "wrong", "was read at least 14 more times"),
    "LP601": (lp6_applying.never_applied, (7,), "absent", "none of the 7 rows"),
    "LP602": (lp6_applying.contamination, ("a", AFFECTED), "wrong", "3 rows of 2 requests that did not ask for `a`"),
    "LP603": (lp6_applying.rows_missed, (2, 5), "wrong", "2 of 5 rows"),
    "LP604": (lp6_applying.kernel_differs, (0.1, 1e-3, 4), "wrong", "differs by 0.1 relative on 4 sampled rows"),
    "LP604 factor": (lp6_applying.kernel_differs, (1.0, 1e-3, 4, 2.0), "wrong", "is 2 times what it should be on 4"),
    "LP605": (lp6_applying.not_finite_output, (), "wrong", "NaN or infinity"),
    "LP606": (lp6_applying.not_in_its_slot, ("a", AFFECTED), "wrong", "3 rows of 2 requests for `a` ran with a slot"),
    "LP607": (lp6_applying.other_weights_in_prefix_cache, ("a", AFFECTED), "wrong", "3 cached positions of 2 requests"),
    "LP608": (lp6_applying.served_as_base, ("a", "b"), "wrong", "requests for `a` exactly as those for its base `b`"),
    "LP609": (lp6_applying.served_at_another_scaling, ("a", 2.8284), "wrong", "runs `a` at 2.83 times the scaling"),
    "LP610": (lp6_applying.served_other_weights, ("a", 0.5, 0.25), "wrong", "differ by 0.5 from PEFT's"),
    "LP620": (lp6_comparing.not_requested, ("candidate", 2), "absent", "the same 2 prompts with the base model"),
    "LP621": (lp6_comparing.weights_at_another_scale, ("it is twice",), "wrong", "it is twice"),
    "LP622": (lp6_comparing.other_weights_in_use, ("it is other",), "wrong", "it is other"),
    "LP623": (lp6_comparing.weights_of_another_module, ("k is v",), "wrong", "k is v"),
    "LP624": (lp6_comparing.weights_of_another_adapter, ("a is b",), "wrong", "a is b"),
    "LP625": (lp6_comparing.different_files, ("rank", ("/a", "/b")), "wrong", "different adapters, /a and /b: rank"),
    "LP626": (
        lp6_comparing.different_prompts,
        (1, 0, 1),
        "wrong",
        "the prompt became other token ids, first at token 1",
    ),
    "LP627": (lp6_comparing.different_bases, ("x differs",), "wrong", "the base models differ: x differs"),
    "LP628": (
        lp6_comparing.not_deterministic,
        ("reference", 0.5, 0.25),
        "wrong",
        "by 0.5, and between the runs by 0.25",
    ),
    "LP629": (lp6_comparing.unexplained_difference, ("why",), "wrong", "why"),
    "LP611": (lp6_applying.served_on_another_base, ("m", 1.5), "wrong", "base model is not `m`"),
}


@pytest.mark.parametrize("code", CASES)
def test_a_rule_makes_a_finding_of_its_facts(code: str) -> None:
    judge, facts, value, words = CASES[code]
    finding = judge(*facts)
    assert (finding.code, finding.value) == (code.partition(" ")[0], value)
    assert words in finding.message


def test_every_rule_on_running_engines_is_here() -> None:
    assert {code for code in all_rules() if code.startswith(("LP5", "LP6"))} <= set(CASES)


def test_two_names_are_told_apart_by_their_beginnings() -> None:
    names = ("language_model.model.layers.0.q_proj", "model.layers.0.q_proj", "vLLM")
    finding = lp5_loading.name_without_home(*names)
    assert isinstance(finding, Finding)
    assert "`language_model.model.layers`" in finding.message
    assert "`model.layers`" in finding.message
