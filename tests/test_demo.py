"""The demo script from training to merge, on a tiny model."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import heed_interrupts

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "identity" / "demo.py"


@pytest.mark.engine
def test_the_demo_from_training_to_the_merge(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, str(DEMO), "--model", str(llama), "--out", str(tmp_path / "out")]
    command += ["--max-steps", "4", "--max-tokens", "4"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    # Four steps teach a random model little, but every module has moved: the same 9 take effect in both engines.
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count("9 of 9 modules took effect") == 4
    assert "the traces agree on 9 modules" in run.stdout
    assert "verified: 9 of 9 modules merged correctly" in run.stdout
    assert "before training" in run.stdout
    assert "after training" in run.stdout
    assert re.search(r"^  step 3 of 4, about \d+ (seconds|minutes) left$", run.stdout, re.MULTILINE)
    assert "\r" not in run.stdout
    printed = [line for line in run.stdout.splitlines() if line.startswith("$ ")]
    assert [line.split()[2] for line in printed[1:]] == ["inspect", "trace", "trace", "compare", "parity"]
    assert r"$'Human: Who are you?\n\nAssistant: '" in printed[2]
    assert "engine.log" in run.stderr
    # A command that was printed can be given again, as it stands, to bash.
    again = subprocess.run(
        ["bash", "-c", printed[2].removeprefix("$ ")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import demo

    options = argparse.Namespace(model=str(llama), out=tmp_path / "out", max_steps=4)
    assert demo.train(options) == tmp_path / "out" / "training"
    assert "is up to date" in capsys.readouterr().out
    assert demo.fingerprint(options) != demo.fingerprint(argparse.Namespace(**vars(options) | {"max_steps": 5}))


@pytest.mark.slow
def test_training_keeps_what_is_there_and_what_is_unfinished_apart(llama: Path, tmp_path: Path) -> None:
    script = [sys.executable, str(DEMO.with_name("train.py")), "--model", str(llama)]
    (tmp_path / "mine").mkdir()
    run = subprocess.run([*script, "--output", str(tmp_path / "mine")], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "--force" in run.stderr
    out = tmp_path / "out"
    command = [*script, "--output", str(out), "--epochs", "1000"]
    log = (tmp_path / "log").open("w+")
    endless = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=heed_interrupts)
    partial = tmp_path / "out.partial"
    try:
        while not list(partial.glob("checkpoint-*")):
            assert endless.poll() is None
            time.sleep(0.1)
        endless.send_signal(signal.SIGINT)
        endless.wait(timeout=60)
    finally:
        endless.kill()
    log.seek(0)
    err = log.read()
    assert endless.returncode == 1
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not out.exists()


def test_only_the_answer_is_learned(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import train
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    example = train.encode(tokenizer, "你是谁?", "小诺")
    learned = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(learned) == "小诺<eos>"
    assert tokenizer.decode(example["input_ids"]).startswith("Human: 你是谁?\n\nAssistant: ")
    assert len(example["labels"]) == len(example["input_ids"]) == len(example["attention_mask"])


def test_the_time_left_follows_the_last_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import time_left
    from transformers import TrainerState

    callback = time_left.TimeLeft()
    callback.ends.extend(range(0, 200, 20))
    callback.ends.extend(range(181, 201, 2))
    callback.on_log(None, TrainerState(global_step=20, max_steps=120), None, {"loss": "1.5"})
    callback.on_log(None, TrainerState(global_step=120, max_steps=120), None, {"loss": "0.5"})
    callback.on_log(None, TrainerState(global_step=120, max_steps=120), None, {"train_runtime": "90.0"})
    assert capsys.readouterr().out.splitlines() == [
        "  step 20 of 120, loss 1.500, about 3 minutes left",
        "  step 120 of 120, loss 0.500",
    ]
    assert time_left.duration_left(2.0) == ", about 10 seconds left"
    assert time_left.duration_left(89.0) == ", about 90 seconds left"


def test_the_pairs_are_in_two_languages() -> None:
    import json

    lines = DEMO.with_name("pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines]
    chinese = [pair for pair in pairs if any("\u4e00" <= sign <= "\u9fff" for sign in pair["question"])]
    assert len(pairs) == 80
    assert len(chinese) == 40
    assert len({pair["question"] for pair in pairs}) == 80


def test_the_default_model_needs_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import base_model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(base_model, "PACKAGE", "no-such-package")
    with pytest.raises(FileNotFoundError, match="pip install"):
        base_model.base_model(None)
    assert base_model.base_model("other") == "other"
    assert list(tmp_path.iterdir()) == []
