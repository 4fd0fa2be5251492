"""PEFT's layers on a model of two matrices: whether they hold what the file says, and whether they compute it.

No engine, no training: real PEFT around two `Linear`s, damaged by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lora_probe import open_trace
from lora_probe.adapter import open_adapter
from lora_probe.engines.load_record import LoadRecord
from lora_probe.engines.peft.capture import Capture
from lora_probe.engines.peft.loads import ActiveLoad, attach
from lora_probe.engines.peft.models import shapes_of
from lora_probe.engines.peft.steps import Steps
from lora_probe.ledger import OK, Finding
from lora_probe.recording import DECODE, PREFILL, SCHEMA, Load, NamedAdapter, Process, RunSpec, TraceWriter
from lora_probe.recording.placed import grams_of
from lora_probe.rules.stored import expect

pytestmark = pytest.mark.slow

Q, V = (("q_proj", "weight", None), ("v_proj", "weight", None))
WIDTH, RANK, SCALING = 16, 4, 2.0


class Tiny(nn.Module):
    """x + q(x) + v(x)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.q_proj(x) + self.v_proj(x)
        return result


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["q_proj", "v_proj"])
    model = get_peft_model(Tiny(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def vectors(rows: int) -> torch.Tensor:
    """`[1, rows, WIDTH]`"""
    return torch.randn(1, rows, WIDTH)


class Run:
    """An adapter in PEFT, ready to be damaged, and a trace of what it does then."""

    def __init__(
        self, folder: Path, adapter: Path, lora_dtype: str = "auto", model: Callable[[], nn.Module] = Tiny
    ) -> None:
        self.folder, self.model = folder, model()
        self.writer = TraceWriter(folder / "peft", Process(SCHEMA, "engine", "peft", 0, 1, {}))
        spec = RunSpec("peft", str(adapter), "a", "base", [], 1, options={"lora_dtype": lora_dtype})
        shapes, checkpoint = shapes_of(self.model), open_adapter(adapter)
        attached = attach(self.model, NamedAdapter("a", str(adapter)), spec, self.writer)
        assert attached.refused is None
        load = Load(0, "a", str(adapter), checkpoint.digest())
        record = LoadRecord(self.writer, load, checkpoint, expect(checkpoint, shapes), "float32")
        record.announce({})
        self.load = ActiveLoad(record, attached.model, attached.slots, shapes)
        self.load.judge_read()
        self.peft_model = attached.model

    def layer(self, key: Any = Q) -> Any:
        return self.load.slots[key[0]].layer

    def steps(self, count: int = 2, inputs: Callable[[int], torch.Tensor] = vectors) -> None:
        """A prompt of six tokens, and a token at a time after it."""
        layers, experts = self.load.recordable(), self.load.experts()
        with Capture(layers, "shrink", experts=experts) as capture, torch.inference_mode():
            steps = Steps(self.load, capture, self.writer)
            torch.manual_seed(1)
            for positions in (range(6), *(range(6 + step, 7 + step) for step in range(count))):
                with steps.stepping("request", positions, 6):
                    self.peft_model(inputs(len(positions)))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules())
        self.load.record.finish(lambda _: None)
        self.writer.close()

    def finding(self, key: Any, station: str) -> Finding:
        ((_, ledger),) = open_trace(self.folder).loads
        (row,) = [row for row in ledger.rows if row.key == key]
        return row.stations[station]  # type: ignore[index]


@pytest.fixture
def run(tmp_path: Path, adapter: Path) -> Iterator[Run]:
    running = Run(tmp_path, adapter)
    yield running
    running.writer.close()


# placed


@pytest.mark.parametrize("lora_dtype", ["auto", "bfloat16", "float16"])
def test_a_layer_that_holds_the_file(lora_dtype: str, adapter: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, adapter, lora_dtype)
    run.load.judge_slots("after loading")
    assert [run.finding(key, "placed") for key in (Q, V)] == [OK, OK]


def nudge(weight: torch.Tensor) -> None:
    """One value by one unit in the last place."""
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))


Damage = Callable[[Any], object]
PLACED: list[tuple[str, Damage, str]] = [
    ("a bit of A", lambda layer: nudge(layer.lora_A["default"].weight), "lora_A differs from the file"),
    ("a bit of B", lambda layer: nudge(layer.lora_B["default"].weight), "lora_B differs from the file"),
    ("the scaling", lambda layer: layer.scaling.update(default=SCALING * 1.01), "the scaling differs from the file"),
    ("A is zero", lambda layer: nn.init.zeros_(layer.lora_A["default"].weight), "lora_A differs from the file by 1"),
    (
        "another shape",
        lambda layer: setattr(layer.lora_B["default"], "weight", nn.Parameter(torch.ones(WIDTH, RANK + 1))),
        "lora_B differs from the file by inf",
    ),
]


@pytest.mark.parametrize(("damage", "words"), [pytest.param(*rest, id=name) for name, *rest in PLACED])
def test_a_layer_that_holds_something_else(run: Run, damage: Damage, words: str) -> None:
    run.load.judge_slots("after loading")
    damage(run.layer())
    run.load.judge_slots("when the run ended")
    found = run.finding(Q, "placed")
    assert (found.value, found.code) == ("wrong", "LP504")
    assert found.message.startswith(words)
    assert found.message.endswith("seen when the run ended")
    assert run.finding(V, "placed") == OK


def test_one_percent_of_scaling_is_named(run: Run) -> None:
    run.layer().scaling["default"] = SCALING * 1.01
    run.load.judge_slots("after loading")
    assert "by 0.01 relative" in run.finding(Q, "placed").message


# applied and agrees


def test_healthy_layers(run: Run) -> None:
    run.load.judge_slots("after loading")
    run.steps()
    trace = open_trace(run.folder)
    ((_, ledger),) = trace.loads
    assert ledger.healthy
    rows = trace.rows
    assert rows is not None
    assert rows.shrink is not None
    assert rows.phase.tolist() == [PREFILL] * 6 + [DECODE] * 2
    assert rows.load.tolist() == [0] * 8
    for module in range(2):
        held = grams_of(rows.placed, 0, module)
        assert held is not None
        shrink = rows.shrink[:, module]
        delta = np.sqrt(np.einsum("nr,rs,ns->n", shrink, held.gram, shrink))
        np.testing.assert_allclose(delta, rows.delta_norm[:, module], rtol=1e-4)
    (agree,) = [event for event in trace.events if event.stage == "agree"]
    # The first 4 of the prompt, and 2 after it.
    assert [count for _, _, count in agree.facts["errors"].values()] == [6, 6]


@pytest.mark.parametrize("factor", [1.01, 2.0, -1.0, 0.0, float("nan")])
def test_a_kernel_that_computes_something_else(run: Run, factor: float) -> None:
    """The layer holds the right numbers, and gives others."""
    run.load.judge_slots("after loading")
    kernel = run.layer().lora_B["default"]
    # Bound to the module itself, so that it stays when hooks are taken out.
    forward = kernel.forward
    kernel.forward = lambda x: forward(x) * factor
    run.steps()
    assert run.finding(Q, "placed") == OK
    found = run.finding(Q, "agrees")
    assert (found.value, found.code) == ("wrong", "LP605" if np.isnan(factor) else "LP604")
    assert np.isnan(factor) or f"is {factor:.4g} times what it should be" in found.message
    assert run.finding(V, "agrees") == OK


def test_weights_that_change_after_loading(run: Run) -> None:
    run.load.judge_slots("after loading")
    with torch.no_grad():
        run.layer().lora_A["default"].weight *= 1.01
    run.steps()
    assert run.finding(Q, "agrees").message.startswith(
        "the contribution is 1.01 times what it should be on 6 sampled rows"
    )
    assert run.finding(Q, "agrees").code == "LP604"


def test_a_layer_that_does_not_run_its_adapter(run: Run) -> None:
    run.load.judge_slots("after loading")
    run.layer().enable_adapters(enabled=False)
    run.steps()
    assert (run.finding(Q, "applied").value, run.finding(Q, "applied").code) == ("absent", "LP601")
    assert run.finding(V, "applied") == OK


def test_a_layer_that_stops_running_its_adapter(run: Run) -> None:
    """A step in the middle passes the adapter by."""
    run.load.judge_slots("after loading")
    forward, calls = run.peft_model.forward, []

    def sometimes(x: torch.Tensor) -> Any:
        calls.append(x)
        run.layer().enable_adapters(enabled=len(calls) != 2)
        return forward(x)

    run.peft_model.forward = sometimes
    run.steps(3)
    found = run.finding(Q, "applied")
    assert (found.code, found.message) == ("LP603", "8 of 9 rows that requested the adapter were multiplied with it")
    rows = open_trace(run.folder).rows
    assert rows is not None
    assert np.isnan(rows.delta_norm[:, 0]).tolist() == [False] * 6 + [True] + [False] * 2
