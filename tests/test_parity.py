"""`lora-probe parity` as a user runs it: text, JSON, exit status, what is kept, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, TARGETS, save_tokenizer
from json_schemas import require_valid
from merges import damaged, merge_by_peft, save_adapter_of, save_model

import lora_probe
from lora_probe.errors import ProbeError
from lora_probe.merging.parity import REPORT, parity

COMMAND = str(Path(sys.executable).with_name("lora-probe"))
MODULES = 3 * LAYERS


def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([COMMAND, "parity", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if "json" in arguments:
        require_valid(["parity"], done.stdout)
    return done


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.base = save_model(root / "base", "llama")
        save_tokenizer(self.base)
        self.adapter = save_adapter_of(root / "adapter", self.base, target_modules=list(TARGETS))
        self.merged = merge_by_peft(root / "merged", self.adapter, self.base, "float32")
        self.half = damaged(self.merged, root / "half", self._half)

    def _half(self, tensors: dict[str, Any]) -> dict[str, Any]:
        from safetensors.torch import load_file

        base = load_file(self.base / "model.safetensors")
        return {name: tensor if "layers.1" not in name else base[name] for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("parity"))


def test_without_a_merge_peft_makes_it_and_both_halves_are_judged(world: World, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    done = run(world.adapter, "--dtype", "bfloat16", "--max-tokens", 8, "-o", kept)
    assert "made by PEFT in BF16" in done.stdout
    assert f"{MODULES} of {MODULES} modules: bit for bit PEFT's merge" in done.stdout
    assert f"verified: {MODULES} of {MODULES} modules merged correctly" in done.stdout
    assert "of the effect survives" in done.stdout
    assert "weights: 100 %" in done.stderr
    assert {path.name for path in kept.iterdir()} == {"merged", "unmerged.lptrace", "merged.lptrace", REPORT}
    found = json.loads((kept / REPORT).read_text())
    assert found["verdict"] == "verified"
    assert found["merged"] is None
    assert found["dtypes"] == {"base": "F32", "merged": "BF16"}
    outputs = found["outputs"]
    assert outputs["engine"] == "peft"
    assert outputs["dtype"] == "bfloat16"
    assert outputs["top1"] == 1
    assert outputs["survives"] > 0.9
    assert outputs["kl_base"] > outputs["kl_merged"] >= 0
    assert len(outputs["prompts"]) == 3
    # The same again: refused, then overwritten.
    assert "exists" in run(world.adapter, "-o", kept, "--weights-only", status=2).stderr
    run(world.adapter, "-o", kept, "--weights-only", "--force")
    assert {path.name for path in kept.iterdir()} == {"merged", REPORT}


def test_a_merge_that_leaves_a_layer_out_is_named_in_both_halves(world: World) -> None:
    done = run(
        world.adapter,
        "--merged",
        world.half,
        "--prompt",
        "Who are you?",
        "--max-tokens",
        8,
        "--format",
        "json",
        status=1,
    )
    found = json.loads(done.stdout)
    assert found["verdict"] == "differs"
    assert [d["code"] for d in found["diagnostics"]] == ["LP701", "LP716"]
    layer = [f"model.layers.1.self_attn.{name}" for name in TARGETS]
    assert found["diagnostics"][0]["modules"] == layer
    wrong = [module for module in found["modules"] if module["status"] == "differs"]
    assert [module["module"] for module in wrong] == layer
    assert {module["implied_scaling"] for module in wrong} == {0.0}
    assert found["outputs"]["first_module"]["module"] == layer[0]
    assert "layer 1 q_proj" in found["diagnostics"][1]["message"]


def test_every_field_of_a_module(world: World) -> None:
    done = run(world.adapter, "--merged", world.merged, "--weights-only", "--format", "json")
    found = json.loads(done.stdout)
    assert found["schema_version"] == 1
    assert found["outputs"] is None
    assert found["diagnostics"] == []
    assert len(found["modules"]) == MODULES
    for module in found["modules"]:
        assert module["status"] == "verified"
        assert module["bit_exact"] is True
        assert module["share"] == pytest.approx(1, abs=1e-5)
        assert module["effect_kept"] == pytest.approx(1, abs=1e-5)
        assert module["residual"] < 1e-5
        assert module["implied_scaling"] == module["scaling"] == 2


def test_weights_only_needs_no_torch(world: World) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'peft', 'vllm')));"
        "from lora_probe.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["parity", world.adapter, "--merged", world.merged, "--weights-only"]
    subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True)


def test_as_a_function(world: World) -> None:
    found = lora_probe.parity(world.adapter, merged=world.half, weights_only=True)
    assert found.verdict == "differs"
    assert found.outputs is None
    assert [diagnostic.code for diagnostic in found.diagnostics] == ["LP701"]
    with pytest.raises(ProbeError, match="unknown engine `sglang`"):
        parity(world.adapter, merged=world.merged, engine="sglang")


def test_an_engine_that_cannot_run_the_merged_model_leaves_the_weights_judged(world: World, tmp_path: Path) -> None:
    lame = damaged(world.merged, tmp_path / "lame", lambda tensors: tensors, model_type="nothing-known")
    done = run(world.adapter, "--merged", lame, "--prompt", "a", "--max-tokens", 2, "--format", "json", status=1)
    found = json.loads(done.stdout)
    assert found["verdict"] == "undecided"
    assert [d["code"] for d in found["diagnostics"]] == ["LP717"]
    assert "peft could not run both models" in found["diagnostics"][0]["message"]
    assert all(module["status"] == "verified" for module in found["modules"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "folder `nowhere` does not exist"),
        (["{adapter}", "--merged", "nowhere"], "merged model `nowhere` was not found"),
        (["{adapter}", "--merged", "{adapter}"], "is an adapter, not a merged model"),
        (["{adapter}", "--merged", "{base}", "--weights-only"], "are the same folder"),
        (
            ["{adapter}", "--merged", "{merged}", "--weights-only", "--dtype", "bfloat16"],
            "cannot be combined with --dtype",
        ),
        (
            ["{adapter}", "--merged", "{merged}", "--weights-only", "--prompt", "a", "--engine", "vllm"],
            "no engine runs with --weights-only",
        ),
        (["{adapter}", "--merged", "{merged}", "--", "--seed", "1"], "peft accepts no engine flags (--seed 1)"),
        (["{adapter}", "--merged", "{merged}", "--prompt", ""], "a prompt is empty"),
        (["{adapter}", "--merged", "{merged}", "--model", "{adapter}"], "it has no config.json"),
        (["{adapter}", "--engine", "sglang"], "unknown engine `sglang`"),
        (["{adapter}", "--max-tokens", "0"], "--max-tokens must be at least 1, not 0"),
        (["{adapter}", "--max-tokens", "many"], "invalid int value"),
        (["{adapter}", "-o", "{base}", "--force"], "was not written by parity"),
    ],
)
def test_bad_input_is_one_error(arguments: list[str], words: str, world: World) -> None:
    names = {"adapter": world.adapter, "merged": world.merged, "base": world.base}
    done = run(*(word.format(**names) for word in arguments), status=2)
    assert words in done.stderr
    assert done.stdout == ""


def test_an_unreadable_merged_folder(world: World, tmp_path: Path) -> None:
    broken = damaged(world.merged, tmp_path / "broken", lambda tensors: tensors)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is truncated" in run(world.adapter, "--merged", broken, "--weights-only", status=2).stderr
    weights.unlink()
    assert "holds no weights" in run(world.adapter, "--merged", broken, "--weights-only", status=2).stderr


def test_ended_from_outside_nothing_is_left(world: World, tmp_path: Path) -> None:
    """SIGTERM, as `timeout` and systemd send it, in the middle of PEFT's merge."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [COMMAND, "parity", str(world.adapter)], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("lora-probe-*/lora-probe-*/merged.partial/merge")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "interrupted" in said
    assert not list(tmp_path.iterdir())


def test_a_module_that_is_not_there_counts(world: World, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    hole = damaged(world.merged, tmp_path / "hole", lambda t: {n: tensor for n, tensor in t.items() if n != name})
    done = run(world.adapter, "--merged", hole, "--weights-only", status=1)
    assert f"{MODULES - 1} of {MODULES} modules: bit for bit" in done.stdout
    assert "missing" in done.stdout
    assert f"differs: {name}: missing from the merged model" in done.stdout


def test_the_wrong_base_is_called_that(world: World, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "wide", seed=3)
    done = run(world.adapter, "--merged", world.merged, "--model", other, "--weights-only", status=1)
    assert "LP714" in done.stdout
    assert "all equal to the base" not in done.stdout
