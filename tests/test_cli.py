"""The command line as a user calls it, in separate processes if that matters."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import LAYERS, call, edited, heed_interrupts

MODULES = 3 * LAYERS


def test_nothing_heavy_is_imported() -> None:
    script = (
        "import sys, lora_probe.cli.main; print([n for n in"
        " ('torch', 'transformers', 'peft', 'vllm') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_commands_that_read_need_neither_torch_nor_peft_nor_vllm(peft_trace: Any, adapter: Path) -> None:
    """`inspect`, `show`, `compare` and `rule` with those imports made impossible."""
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'peft', 'vllm'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from lora_probe.cli.main import main\n"
        f"a, t = {str(adapter)!r}, {str(peft_trace.path)!r}\n"
        "for c in (['inspect', a, '--norms'], ['show', t], ['compare', t, t], ['rule', 'LP201'], ['env']):\n"
        "    assert main(c) == 0, c\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_help_of_every_command_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "check", "trace", "show", "attach", "compare", "parity", "rule", "env"):
        status, out, _ = call(command, "--help", capsys=capsys)
        assert status == 0
        assert f"lora-probe {command}" in out.lower().split("examples:")[1]


def test_inspect(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call("inspect", adapter, capsys=capsys)
    assert status == 0
    assert "rank 8, alpha 16, scaling 2" in out
    assert "q_proj      3        0-2     8×128  128×8  8     2        F32" in out
    assert "--norms" in err
    status, out, _ = call("inspect", adapter, "--norms", capsys=capsys)
    assert status == 0
    assert len([line for line in out.splitlines() if " r " in line and line[0].isdigit()]) == LAYERS


def test_inspect_as_json(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("inspect", adapter, "--format", "json", "--norms", capsys=capsys)
    data = json.loads(out)
    assert status == 0
    assert data["schema_version"] == 1
    assert len(data["modules"]) == MODULES
    assert sum(len(module["tensors"]) for module in data["modules"]) == 2 * MODULES
    assert data["modules"][0]["norm"] > 0
    assert len(data["modules"][0]["singular_values"]) == 8


def test_inspect_says_what_is_no_number(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    broken = edited(adapter, tmp_path / "nan", lambda t: t | {name: t[name] * float("nan")})
    half = edited(adapter, tmp_path / "half", lambda t: {n: v for n, v in t.items() if n != name})
    assert "not finite" in call("inspect", broken, "--norms", capsys=capsys)[1]
    out = call("inspect", half, "--norms", capsys=capsys)[1]
    assert "not a pair" in out
    assert "missing" in out
    assert json.loads(call("inspect", broken, "--norms", "--format", "json", capsys=capsys)[1])


def test_show_is_what_trace_showed(peft_trace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = call("show", peft_trace.path, capsys=capsys)
    assert status == 0
    assert f"{MODULES} of {MODULES} modules took effect" in out
    assert "with the adapter" in out
    assert err == ""
    data = json.loads(call("show", peft_trace.path, "--format", "json", capsys=capsys)[1])
    assert data["complete"] is True
    assert data["ledger"]["peft"]["total"] == MODULES
    every = call("show", peft_trace.path, "--events", capsys=capsys)[1]
    assert every.count("wrap ") == MODULES


def kill(trace: Path) -> None:
    """Make a trace that this process recorded look like one of a process that was killed."""
    path = trace / "peft" / "process.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"closed": False, "pid": 1}))


def test_compare_statuses(peft_trace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = peft_trace.path
    status, out, _ = call("compare", path, path, capsys=capsys)
    assert status == 0
    assert f"the traces agree on {MODULES} modules" in out
    data = json.loads(call("compare", path, path, "--format", "json", capsys=capsys)[1])
    assert data["verdict"] == "agree"
    assert data["ledger"].keys() == {"reference", "candidate"}
    kill(path)
    status, out, _ = call("compare", path, path, capsys=capsys)
    assert status == 2
    assert "is incomplete: peft" in out
    status, out, _ = call("show", path, capsys=capsys)
    assert status == 1
    assert "incomplete: peft did not exit cleanly;" in out


def test_rules(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call("rule", "lp201", capsys=capsys)
    assert status == 0
    assert "Why it matters" in out
    status, out, _ = call("rule", "--format", "json", capsys=capsys)
    assert {"LP201", "LP501", "LP604"} <= {rule["code"] for rule in json.loads(out)["rules"]}
    status, _, err = call("rule", "LP2O1", capsys=capsys)
    assert status == 2
    assert "unknown rule `LP2O1`; did you mean LP201 or LP211 or LP221?" in err
    assert "201-2" in err


def bad_inputs(adapter: Path, llama: Path, tmp_path: Path) -> dict[str, tuple[list[str | Path], str]]:
    def damaged(name: str, file: str, content: bytes | None) -> Path:
        folder = edited(adapter, tmp_path / name)
        if content is None:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(content)
        return folder

    weights, config = "adapter_model.safetensors", "adapter_config.json"
    whole = (adapter / weights).read_bytes()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "not-a-trace").mkdir()
    trace = ["trace", "--engine", "peft", "-o", tmp_path / "run.lptrace"]
    return {
        "no folder": (["inspect", tmp_path / "no"], "no"),
        "a file": (["inspect", tmp_path / "empty.txt"], "is not a file of an adapter"),
        "no config": (["inspect", damaged("a", config, None)], config),
        "broken JSON": (["inspect", damaged("b", config, b"{,")], "line 1"),
        "truncated": (["inspect", damaged("c", weights, whole[:-5])], "truncated"),
        "text for weights": (["inspect", damaged("d", weights, b"hello, I am no tensor")], weights),
        "no weights": (["inspect", damaged("e", weights, None)], weights),
        "unknown engine": (["trace", adapter, "--engine", "tgi"], "engines: peft, vllm"),
        "no base": ([*trace, adapter, "--model", "./nowhere"], "nowhere"),
        "no base id": ([*trace, adapter, "--model", "some/model"], "some/model"),
        "a base that is none": ([*trace, adapter, "--model", tmp_path], "config.json"),
        "no prompts": ([*trace, adapter, "--prompt-file", tmp_path / "empty.txt"], "contains no prompts"),
        "no prompt file": ([*trace, adapter, "--prompt-file", tmp_path / "nope.txt"], "nope.txt"),
        "no tokens": ([*trace, adapter, "--max-tokens", "0"], "--max-tokens"),
        "flags for peft": ([*trace, adapter, "--", "--seed", "1"], "flags after `--`"),
        "flags for show": (["show", tmp_path, "two", "--", "--seed"], "unrecognized arguments: ./--seed"),
        "two sources of prompts": (
            [*trace, adapter, "--follow", tmp_path, "--prompt", "x"],
            "uses the prompts of the followed trace",
        ),
        "nothing to follow": ([*trace, adapter, "--follow", tmp_path / "lost"], "lost"),
        "a tolerance that is none": (["compare", tmp_path, tmp_path, "--rtol", "nan"], "not a valid relative"),
        "a prompt that is no text": ([*trace, adapter, "--prompt", "\udcff"], "not valid UTF-8"),
        "a prompt beyond the context": ([*trace, adapter, "--prompt", "x" * 600], "context is 512"),
        "unknown level": ([*trace, adapter, "--keep", "all"], "shrink"),
        "no trace": (["show", tmp_path / "none"], "none"),
        "not a trace": (["show", tmp_path / "not-a-trace"], "is not a trace"),
        "two that are none": (["compare", tmp_path / "x", tmp_path / "y"], "x"),
        "no command": ([], "COMMAND"),
    }


@pytest.mark.slow
def test_bad_input_is_one_error_and_status_2(
    adapter: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (arguments, word) in bad_inputs(adapter, llama, tmp_path).items():
        status, out, err = call(*arguments, capsys=capsys)
        assert status == 2, name
        assert out == "", name
        assert word in err, (name, err)
        assert err.count("error:") == 1, name
        assert "Traceback" not in err, name


def test_a_trace_is_never_overwritten(peft_trace: Any, adapter: Path, tmp_path: Path, capsys: Any) -> None:
    status, _, err = call("trace", adapter, "--engine", "peft", "-o", peft_trace.path, capsys=capsys)
    assert status == 2
    assert "--force" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    status, _, err = call("trace", adapter, "--engine", "peft", "-o", tmp_path / "mine", "--force", capsys=capsys)
    assert status == 2
    assert "is not overwritten" in err
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.slow
def test_trace_in_a_process_of_its_own(adapter: Path, tmp_path: Path) -> None:
    """Only JSON on standard output; a refusal is status 1; a pipe that closes early is not an error."""
    command = [sys.executable, "-m", "lora_probe", "trace", str(adapter), "--engine", "peft", "--max-tokens", "3"]
    run = subprocess.run([*command, "--format", "json"], cwd=tmp_path, capture_output=True, text=True, check=True)
    data = json.loads(run.stdout)
    assert data["headline"] == f"{MODULES} of {MODULES} modules took effect"
    assert data["trace"] == "healthy-peft.lptrace"
    assert "engine.log" in run.stderr
    wrong = edited(adapter, tmp_path / "wrong", config=lambda config: config | {"r": 4})
    command[4] = str(wrong)
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "refused by peft" in run.stdout
    assert "size mismatch" in run.stdout
    first = subprocess.run(
        f"{sys.executable} -m lora_probe show healthy-peft.lptrace | head -1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode == 0
    assert first.stderr == ""


def test_no_colour_in_a_pipe(peft_trace: Any) -> None:
    command = [sys.executable, "-m", "lora_probe", "show", str(peft_trace.path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "\x1b[" not in run.stdout


@pytest.mark.slow
def test_interrupting_a_trace_leaves_nothing_running(adapter: Path, tmp_path: Path) -> None:
    import os
    import signal

    command = [sys.executable, "-m", "lora_probe", "trace", str(adapter), "--engine", "peft"]
    command += ["--max-tokens", "400", "-o", str(tmp_path / "run.lptrace")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    run = subprocess.Popen(command, **pipes, preexec_fn=heed_interrupts)
    process = tmp_path / "run.lptrace" / "peft" / "process.json"
    deadline = time.monotonic() + 60
    while not process.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = json.loads(process.read_text())["pid"]
    second = subprocess.run([*command, "--force"], capture_output=True, text=True, check=False)
    assert (second.returncode, second.stdout) == (2, "")
    assert "run.lptrace` is being recorded by another process" in second.stderr
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=30)
    assert run.returncode == 130
    assert out == ""
    assert "interrupted" in err
    assert "run.lptrace` is incomplete; overwrite it with --force" in err
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert json.loads(process.read_text())["closed"] is False


def test_names_in_files_cannot_drive_the_terminal(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = "layers.0.self_attn.q_proj", "[/red]\x1b]0;mine\x07[bold]x"
    odd = edited(adapter, tmp_path / "odd", lambda t: {n.replace(old, new): v for n, v in t.items()})
    for arguments in (["inspect", odd], ["inspect", odd, "--norms"]):
        status, out, _ = call(*arguments, capsys=capsys)
        assert status == 0
        assert "[/red]" in out
        assert "\x1b" not in out


def test_the_last_hint_is_the_same_command_for_the_other_engine() -> None:
    import argparse
    import shlex

    from lora_probe.cli.trace import next_commands

    given = shlex.split("trace 'a b' --engine peft --dtype float32 --prompt 'x y' -o run.lptrace --force")
    options = argparse.Namespace(engine="peft", follow=None, together=False, own_arguments=given)
    hints = next_commands(options, "run.lptrace")
    assert hints == [
        "lora-probe trace 'a b' --engine vllm --dtype float32 --prompt 'x y' -o OTHER.lptrace",
        "lora-probe compare run.lptrace OTHER.lptrace",
    ]


def test_no_other_engine_runs_adapters_together() -> None:
    import argparse

    from lora_probe.cli.trace import next_commands

    assert next_commands(argparse.Namespace(engine="peft", follow=None, together=True), "run.lptrace") == []


def test_after_following_a_trace_the_hint_compares_with_it() -> None:
    import argparse

    from lora_probe.cli.trace import next_commands

    options = argparse.Namespace(engine="vllm", follow="peft ref.lptrace", own_arguments=["trace"])
    assert next_commands(options, "run.lptrace") == ["lora-probe compare 'peft ref.lptrace' run.lptrace"]


def test_a_closed_pipe_hides_no_finding(peft_trace: Any) -> None:
    """Status 1 stays 1 if the reader closes the pipe early."""
    kill(peft_trace.path)
    for more in ("", "--format json"):
        command = f"{sys.executable} -m lora_probe show {peft_trace.path} {more} | head -1"
        run = subprocess.run(["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}"], capture_output=True, check=False)
        assert run.returncode == 1
        assert run.stderr == b""


def test_a_missing_segment_is_said(peft_trace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (peft_trace.path / "peft" / "000001.safetensors").unlink()
    status, out, _ = call("show", peft_trace.path, capsys=capsys)
    assert status == 1
    assert "1 segments of peft are missing" in out
