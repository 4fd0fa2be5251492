"""vLLM in separate processes: what a shared engine cannot show. Each test here starts an engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import LAYERS, edited, record_peft, save_adapter

pytestmark = pytest.mark.engine
FULLY_SHARDED = ("--", "--fully-sharded-loras")
MODULES = 3 * LAYERS


def trace(adapter: Path, out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lora_probe", "trace", str(adapter), "--engine", "vllm", "-o", str(out)]
    command += ["--prompt", "hi", "--max-tokens", "3", "--max-model-len", "256", *more]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )


def test_the_plugin_was_not_loaded(adapter: Path, tmp_path: Path) -> None:
    run = trace(adapter, tmp_path / "run.lptrace", VLLM_PLUGINS="")
    assert run.returncode == 2
    assert "the plugin was not loaded" in run.stderr
    assert "0 of" not in run.stdout + run.stderr
    assert "Traceback" not in run.stderr


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("sharded", ["sharded", pytest.param("fully sharded", marks=pytest.mark.wide)])
def test_two_tensor_parallel_ranks(sharded: str, qwen2: Path, llama: Path, tmp_path: Path) -> None:
    """Every rank in a process of its own. Qwen2 has biases, in float32; of the Llama the head is adapted too, which is
    whole on every rank and has no rows, in bfloat16."""
    plain = sharded == "sharded"
    base, dtype, tolerance = (qwen2, "float32", 1e-5) if plain else (llama, "bfloat16", 0.02)
    targets = [*PROJECTIONS, *([] if plain else ["lm_head"])]
    wide = save_adapter(tmp_path / "wide", base, target_modules=targets, r=4, lora_alpha=6)
    more = ("--dtype", dtype, "--tensor-parallel-size", "2", "--format", "json", *([] if plain else FULLY_SHARDED))
    # What the run asks for counts, not the environment.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "LORA_PROBE_KEEP": "events"}
    run = trace(wide, tmp_path / "run.lptrace", *more, **environment)
    assert run.returncode == 0, run.stderr
    # Standard output contains JSON alone.
    data = json.loads(run.stdout)
    count = 7 * LAYERS + (not plain)
    assert data["headline"] == f"{count} of {count} modules took effect"
    client, *workers = sorted(data["processes"], key=lambda process: str(process["role"]))
    assert sorted((worker["rank"], worker["dtype"], worker["keep"]) for worker in workers) == [
        (rank, dtype, "shrink") for rank in (0, 1)
    ]
    assert len({process["pid"] for process in (client, *workers)}) == 3
    from lora_probe import compare, open_trace
    from lora_probe.comparison.totals import totals

    options = {"dtype": dtype, "lora_dtype": dtype}
    reference = record_peft(wide, base, tmp_path / "peft.lptrace", prompts=["hi"], max_tokens=3, options=options)
    tensor_parallel = open_trace(tmp_path / "run.lptrace")
    of_ranks, of_peft = (totals(of, [0]).contributions[0] for of in (tensor_parallel, reference))
    norms = {module.key: (module.delta_norm, module.base_norm) for module in of_peft}
    assert len(of_ranks) == len(data["modules"]) == 7 * LAYERS
    for module in of_ranks:
        assert (module.delta_norm, module.base_norm) == pytest.approx(norms[module.key], rel=tolerance)
    compared = compare(reference, tensor_parallel)
    assert compared.verdict == "agree"
    # Every rank has its part of the same weights, so the errors are exact.
    assert not plain or compared.estimated == ""


def test_a_pair_that_is_too_large_is_a_refusal(adapter: Path, tmp_path: Path) -> None:
    """The engine dies while the slot is filled, with a half registered adapter, so it cannot be shared."""
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    large = edited(adapter, tmp_path / "large", lambda t: t | {name: np.tile(t[name], (2, 1))})
    run = trace(large, tmp_path / "run.lptrace", "--dtype", "float32")
    assert run.returncode == 1, run.stderr
    assert "refused by vllm: The size of tensor a (128) must match" in run.stdout
    assert "LP401" in run.stdout


def test_an_engine_that_does_not_start(adapter: Path, tmp_path: Path) -> None:
    run = trace(adapter, tmp_path / "run.lptrace", "--max-lora-rank", "7")
    assert run.returncode == 2
    assert "max-lora-rank" in run.stderr
    assert "Traceback" not in run.stderr
    run = trace(adapter, tmp_path / "two.lptrace", "--", "--no-such-flag")
    assert run.returncode == 2
    assert "--no-such-flag" in run.stderr


def test_a_killed_worker_leaves_a_trace_that_says_so(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "run.lptrace"
    command = [sys.executable, "-m", "lora_probe", "trace", str(adapter), "--engine", "vllm", "-o", str(out)]
    run = subprocess.Popen([*command, "--max-tokens", "200"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    requests = out / "client" / "requests.jsonl"
    wait_for(lambda: requests.exists() and requests.read_bytes().count(b"\n") >= 1)
    pid = json.loads((out / "vllm-rank-0" / "process.json").read_text())["pid"]
    os.kill(pid, signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "SIGKILL" in err
    assert "Traceback" not in err
    shown = subprocess.run(
        [sys.executable, "-m", "lora_probe", "show", str(out)], capture_output=True, text=True, check=False
    )
    assert shown.returncode == 1
    assert "incomplete: client, vllm-rank-0 did not exit cleanly;" in shown.stdout
    assert "the recording ended before it was measured" in shown.stdout


def wait_for(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


INERT = """
import sys
import lora_probe_vllm
lora_probe_vllm.register()
assert not any(name.startswith('vllm') for name in sys.modules), 'registering imported vllm'
from vllm import LLM
if __name__ == '__main__':
    llm = LLM(model={model!r}, dtype='float32', max_model_len=128, enforce_eager=True, max_num_seqs=2)
    (output,) = llm.generate(['hi'], use_tqdm=False)
    from vllm.v1.worker.worker_base import WorkerBase
    from vllm.plugins import plugins_loaded
    assert plugins_loaded
    ours = [name for name in sys.modules if name.startswith('lora_probe_vllm')]
    assert ours == ['lora_probe_vllm'], ours
    assert not [name for name in dir(WorkerBase) if name.startswith('lora_probe')]
    import torch
    hooks = []
    def look(worker):
        return [n for n, m in worker.model_runner.model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    assert llm.collective_rpc(look) == [[]]
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    assert GPUModelRunner.execute_model.__module__.startswith('vllm'), GPUModelRunner.execute_model
    print('inert')
"""


def test_installed_but_not_asked(llama: Path, tmp_path: Path) -> None:
    script = tmp_path / "inert.py"
    script.write_text(INERT.format(model=str(llama)))
    environment = {key: value for key, value in os.environ.items() if key != "LORA_PROBE_TRACE"}
    run = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("inert")


def test_every_seam_is_where_it_is_looked_for() -> None:
    from lora_probe_vllm.seams import NAMES, SUPPORTED, SeamMoved, Seams, vllm_version

    seams = Seams()
    for name in NAMES:
        assert getattr(seams, name) is not None
    assert vllm_version().rpartition(".")[0] in SUPPORTED
    with pytest.raises(AttributeError):
        seams.nothing  # noqa: B018
    error = SeamMoved("vllm.lora.x")
    assert vllm_version() in error.message
    assert "vllm.lora.x" in error.message


def test_a_seam_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.model_manager import LoRAModelManager

    from lora_probe_vllm.seams import SeamMoved, Seams

    monkeypatch.delattr(LoRAModelManager, "register_module")
    with pytest.raises(SeamMoved, match=r"LoRAModelManager.register_module"):
        Seams().manager  # noqa: B018


PATCHES = """
from pathlib import Path
from lora_probe_vllm.patching import install
from lora_probe_vllm.seams import METHODS, seams

def state():
    return {(n, m): vars(getattr(seams, n)).get(m) for n, methods in METHODS.items() for m in methods}

before, names = state(), set(dir(seams.worker))
with install(Path('unused')):
    during = state()
    assert all(before[at] is not during[at] for at in before if at[0] in ('worker', 'runner', 'manager'))
    assert set(dir(seams.worker)) - names == {'lora_probe_begin', 'lora_probe_finish', 'lora_probe_mix'}
assert state() == before
assert set(dir(seams.worker)) == names
"""


def test_patches_are_taken_back() -> None:
    """In a separate process, because the shared engine's worker contains the probe."""
    run = subprocess.run([sys.executable, "-c", PATCHES], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]


OWN = """
import sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
if __name__ == '__main__':
    llm = LLM(model={model!r}, dtype='float32', max_model_len=128, max_num_seqs=2, enable_lora=True, max_loras=2)
    llm.generate(['hi'], SamplingParams(max_tokens=3), use_tqdm=False, lora_request=LoRARequest('own', 7, {adapter!r}))
"""


def test_a_script_of_the_users_own(llama: Path, adapter: Path, tmp_path: Path) -> None:
    """An unchanged script: two environment variables, and the trace is complete when it ends."""
    from lora_probe import open_trace
    from lora_probe.ledger import headline

    script = tmp_path / "own.py"
    script.write_text(OWN.format(model=str(llama), adapter=str(adapter)))
    asked = {"LORA_PROBE_TRACE": str(tmp_path / "run.lptrace"), "LORA_PROBE_KEEP": "shrink"}
    for earlier in ((), (tmp_path / "run.lptrace" / "run-1",)):
        run = subprocess.run([sys.executable, str(script)], env=os.environ | asked, capture_output=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        found = open_trace(tmp_path / "run.lptrace")
        assert found.complete
        assert found.other_runs == earlier
        ((load, ledger),) = found.loads
        assert (load.name, load.engine_id) == ("own", 7)
        assert headline(ledger) == f"{MODULES} of {MODULES} modules took effect"


def test_a_probe_that_cannot_be_armed_does_not_stop_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lora_probe_vllm
    from lora_probe.errors import EngineFailed
    from lora_probe_vllm import patching
    from lora_probe_vllm.llm import require_probe
    from lora_probe_vllm.seams import SeamMoved

    def moved(*_: Any) -> Any:
        raise SeamMoved("vllm.lora.gone")

    monkeypatch.setattr(patching, "install", moved)
    monkeypatch.setattr(patching, "_armed", None)
    monkeypatch.setenv("LORA_PROBE_TRACE", str(tmp_path))
    lora_probe_vllm.register()
    with pytest.raises(EngineFailed, match=r"could not be started: vLLM .* has no `vllm.lora.gone`"):
        require_probe(tmp_path)
