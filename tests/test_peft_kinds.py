"""PEFT's layers of other kinds than `Linear`: fused experts and embeddings, damaged by hand.

No engine, no training: real PEFT around a module with a parameter for each expert, and around an `Embedding`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_peft_layers import Q, Run, Tiny, V
from torch import nn

from lora_probe import open_trace
from lora_probe.engines.peft.dora import why_no_formula
from lora_probe.engines.peft.slots import Slot
from lora_probe.ledger import OK

pytestmark = pytest.mark.slow

EXPERTS, WIDTH, INNER, RANK, SCALING, TOKENS = 4, 16, 12, 4, 2.0, 20
UP, DOWN = (("experts", name, None) for name in ("gate_up_proj", "down_proj"))
TABLE = ("embed", "weight", None)


class Experts(nn.Module):
    """Each row goes through the expert that its first number chooses. `transposed`: the parameters are `[experts, in,
    out]`, as in GPT-OSS."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = (EXPERTS, INNER, WIDTH), (EXPERTS, WIDTH, INNER)
        up, down = reversed(shapes) if transposed else shapes
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = (x[..., :1] * 10).long().abs() % EXPERTS
        every = []
        for up, down in zip(self.gate_up_proj, self.down_proj, strict=True):
            every.append(x @ up @ down if self.is_transposed else x @ up.T @ down.T)
        return torch.stack(every, dim=-2).gather(-2, chosen[..., None].expand(*x.shape[:-1], 1, WIDTH)).squeeze(-2)


class Mixture(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(transposed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.experts(x)
        return result


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.embed(tokens)
        return result


def tokens(rows: int) -> torch.Tensor:
    return torch.randint(TOKENS, (1, rows))


def save(folder: Path, model: nn.Module, **targets: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    peft_model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), **targets))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(params=[False, True], ids=["out by in", "in by out"])
def mixture(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    adapter = save(tmp_path / "a", Mixture(request.param), target_modules=[], target_parameters=parameters)
    running = Run(tmp_path / "run", adapter, model=lambda: Mixture(request.param))
    running.load.judge_slots("after loading")
    yield running
    running.writer.close()


@pytest.fixture
def words(tmp_path: Path) -> Iterator[Run]:
    adapter = save(tmp_path / "a", Words(), target_modules=["embed"])
    running = Run(tmp_path / "run", adapter, model=Words)
    running.load.judge_slots("after loading")
    yield running
    running.writer.close()


def wrapper(run: Run, key: Any = UP) -> Any:
    return run.load.experts()[key].layer


def test_healthy_experts(mixture: Run) -> None:
    mixture.steps()
    trace = open_trace(mixture.folder)
    ((_, ledger),) = trace.loads
    assert ledger.healthy
    (agree,) = (event for event in trace.events if event.stage == "agree")
    assert {name: int(count) for name, (_, _, count) in agree.facts["errors"].items()} == {
        "experts.gate_up_proj": EXPERTS * RANK,
        "experts.down_proj": EXPERTS * RANK,
    }
    assert 0 < max(error for error, *_ in agree.facts["errors"].values()) < 1e-6


Damage = Callable[[Any], object]


def swap(half: str, axis: int) -> Damage:
    """Exchange experts 1 and 2 in one half of the pair: in A the expert runs slowest, in B fastest."""

    def damage(layer: Any) -> None:
        weight = getattr(layer, half)["default"].weight
        by_expert = weight.data.view(EXPERTS, RANK, -1) if axis == 0 else weight.data.view(-1, RANK, EXPERTS)
        by_expert.copy_(by_expert.index_select(axis, torch.tensor([0, 2, 1, 3])))

    return damage


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (swap("lora_A", 0), "lora_A of experts 1-2 differs"),
        (swap("lora_B", 2), "lora_B of experts 1-2 differs"),
        (lambda layer: layer.lora_B["default"].weight.data[:, 3::EXPERTS].mul_(0.5), "lora_B of experts 3 differs"),
        (lambda layer: layer.scaling.update(default=1.0), "the scaling differs"),
    ],
)
def test_experts_that_hold_something_else(mixture: Run, damage: Damage, words: str) -> None:
    damage(wrapper(mixture))
    mixture.load.judge_slots("when the run ended")
    finding = mixture.finding(UP, "placed")
    assert (finding.value, finding.code) == ("wrong", "LP504")
    assert finding.message.startswith(words)
    assert mixture.finding(DOWN, "placed") == OK


def test_experts_that_compute_something_else(mixture: Run) -> None:
    """PEFT has the right A and B and adds another ΔW."""
    layer = wrapper(mixture)
    original = layer.get_delta_factors

    def factors(name: str) -> Any:
        left, right, scaling = original(name)
        left = left.clone()
        left[3] *= 0.5
        return left, right, scaling

    layer.get_delta_factors = factors
    mixture.steps()
    assert mixture.finding(UP, "placed") == OK
    assert mixture.finding(UP, "agrees").code == "LP604"
    assert mixture.finding(DOWN, "agrees") == OK


def test_experts_that_do_not_run(mixture: Run) -> None:
    wrapper(mixture).enable_adapters(enabled=False)
    mixture.steps()
    assert mixture.finding(UP, "applied").code == "LP601"
    assert mixture.finding(DOWN, "applied") == OK


def test_a_healthy_embedding(words: Run) -> None:
    words.steps(inputs=tokens)
    trace = open_trace(words.folder)
    ((_, ledger),) = trace.loads
    assert ledger.healthy
    rows = trace.rows
    assert rows is not None
    assert rows.shrink is not None
    layer = words.layer(TABLE)
    delta = rows.shrink[:, 0] @ layer.lora_embedding_B["default"].detach().numpy().T * SCALING
    np.testing.assert_allclose(np.linalg.norm(delta, axis=1), rows.delta_norm[:, 0], rtol=1e-5)
    assert rows.x_norm[:, 0].tolist() == [1] * 8


@pytest.mark.parametrize("factor", [1.01, 0.0])
def test_an_embedding_that_adds_something_else(words: Run, factor: float) -> None:
    layer = words.layer(TABLE)
    original = layer.forward

    def forward(ids: torch.Tensor) -> Any:
        base = layer.base_layer.weight[ids]
        return base + (original(ids) - base) * factor

    layer.forward = forward
    words.steps(inputs=tokens)
    assert words.finding(TABLE, "placed") == OK
    assert words.finding(TABLE, "agrees").code == "LP604"


@pytest.fixture
def dora(tmp_path: Path) -> Iterator[Run]:
    running = Run(tmp_path / "run", save(tmp_path / "a", Tiny(), target_modules=["q_proj", "v_proj"], use_dora=True))
    running.load.judge_slots("after loading")
    yield running
    running.writer.close()


def test_dora(dora: Run) -> None:
    dora.steps()
    assert [dora.finding(key, station) for key in (Q, V) for station in ("placed", "agrees")] == [OK] * 4


def test_dora_with_other_magnitudes(dora: Run) -> None:
    dora.layer().lora_magnitude_vector["default"].weight.data *= 1.01
    dora.load.judge_slots("when the run ended")
    dora.steps()
    assert dora.finding(Q, "placed").message.startswith("the magnitude vector differs from the file by 0.01 relative")
    assert dora.finding(Q, "agrees").code == "LP604"
    assert [dora.finding(V, station) for station in ("placed", "agrees")] == [OK, OK]


def test_dora_on_another_base(dora: Run) -> None:
    """Its contribution depends on the base's weights: they are those of the live layer."""
    dora.layer().base_layer.weight.data *= 2
    dora.steps()
    assert dora.finding(Q, "agrees") == OK


def test_dora_in_bfloat16_is_not_judged(tmp_path: Path) -> None:
    """PEFT rounds m / ‖W + s·B·A‖, and what remains of it after 1 is subtracted may be all rounding."""
    adapter = save(tmp_path / "a", Tiny(), target_modules=["q_proj", "v_proj"], use_dora=True)
    running = Run(tmp_path / "run", adapter, "bfloat16")
    assert (
        why_no_formula(Slot(running.layer()))
        == "PEFT computes DoRA in bfloat16 here, whose rounding may exceed the contribution"
    )
    running.writer.close()
