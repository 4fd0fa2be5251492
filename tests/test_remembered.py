"""Cached answers of engines: everything that an answer depends on is in its key, and changed files are not used."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import stat
from pathlib import Path

import pytest

from lora_probe.adapter import TrainedAs
from lora_probe.base import Base, EngineView, ModuleView, open_base
from lora_probe.engines.remembered import keys_of, remember, remembered

VIEW = EngineView("peft", "0.21", "LlamaForCausalLM", {"model.layers.0.q_proj": ModuleView("linear", (8, 8), "q")})


@pytest.fixture
def base(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Base:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LORA_PROBE_NO_CACHE", raising=False)
    shutil.copytree(llama, tmp_path / "base")
    return open_base(str(tmp_path / "base"))


def key(base: Base, engine: str = "peft", task: str | None = "CAUSAL_LM") -> str:
    found = keys_of(base, [engine], TrainedAs(task))[engine]
    assert found is not None
    return found


def place(tmp_path: Path, name: str) -> Path:
    return tmp_path / "cache" / "lora-probe" / "views" / f"{name}.json"


def test_an_answer_comes_back_whole(base: Base) -> None:
    assert remembered(key(base)) is None
    remember(key(base), VIEW)
    assert remembered(key(base)) == VIEW
    remember(key(base), "transformers has no such model")
    assert remembered(key(base)) == "transformers has no such model"


def test_what_decides_an_answer_decides_its_key(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key(base), key(base, "vllm"), key(base, task=None)}
    for name, content in (
        ("config.json", "{}"),
        ("hf_quant_config.json", "{}"),
        ("hf_quant_config.json", '{"a": 1}'),
        ("1_Pooling/config.json", "{}"),
        ("params.json", "{}"),
        ("weights.gguf", "x"),
    ):
        (base.path / name).parent.mkdir(exist_ok=True)
        (base.path / name).write_text(content)
        keys.add(key(base))
    monkeypatch.setenv("VLLM_PLUGINS", "mine")
    keys.add(key(base))
    installed = tmp_path / "site" / "another_plugin-1.0.dist-info"
    installed.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(installed.parent))
    keys.add(key(base))
    assert len(keys) == 11
    assert key(base) in keys


def test_a_long_config_decides_by_its_content(base: Base) -> None:
    """Not by its size, which can be the same for two configs."""
    config = base.path / "config.json"
    text = config.read_text()
    keys = set()
    for layers in ("3", "2"):
        changed = text.replace('"num_hidden_layers": 3', f'"num_hidden_layers": {layers}')
        config.write_text(changed + " " * (2_000_000 - len(changed)))
        keys.add(key(base))
    assert len(keys) == 2
    (base.path / "huge.json").write_bytes(b" " * 50_000_001)
    assert keys_of(base, ["peft"], TrainedAs()) == {"peft": None}


def test_files_are_for_their_owner_alone(base: Base, tmp_path: Path) -> None:
    folder = place(tmp_path, "x").parent
    folder.mkdir(parents=True, mode=0o777)
    folder.chmod(0o777)
    remember(key(base), VIEW)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()] == [0o600]


@pytest.mark.parametrize(
    "kind", ["pipe", "link", "edited", "of another key", "writable", "cut", "nonsense", "deep", "empty", "device"]
)
def test_what_was_not_written_there_is_not_believed(kind: str, base: Base, tmp_path: Path) -> None:
    remember(key(base), VIEW)
    file = place(tmp_path, key(base))
    content = file.read_bytes()
    assert b"q_proj" in content
    if kind == "writable":
        file.chmod(0o666)
    elif kind == "edited":
        file.write_bytes(content.replace(b"q_proj", b"k_proj"))
    elif kind == "cut":
        file.write_bytes(content[:-10])
    elif kind == "nonsense":
        file.write_text(json.dumps({"key": [], "digest": None}))
    elif kind in ("deep", "empty"):
        body = b'{"view": ' + b"[" * 200_000 + b"]" * 200_000 + b"}" if kind == "deep" else b"{}"
        digest = hashlib.sha256(key(base).encode() + body).hexdigest()
        file.write_bytes(b'{"key": "%b", "digest": "%b", "answer": %b}' % (key(base).encode(), digest.encode(), body))
    elif kind == "of another key":
        remember(key(base, "vllm"), VIEW)
        shutil.copy(place(tmp_path, key(base, "vllm")), file)
    else:
        file.unlink()
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "device":
            file.symlink_to("/dev/zero")
        else:
            (tmp_path / "elsewhere").write_bytes(content)
            file.symlink_to(tmp_path / "elsewhere")
    assert remembered(key(base)) is None
    # The answer is asked for again, and takes the place of what is there.
    remember(key(base), VIEW)
    assert remembered(key(base)) == VIEW
    assert not file.is_symlink()


def test_a_folder_that_is_not_ours_is_not_used(base: Base, tmp_path: Path) -> None:
    folder = place(tmp_path, "x").parent
    folder.parent.mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    folder.symlink_to(tmp_path / "theirs")
    remember(key(base), VIEW)
    assert remembered(key(base)) is None
    assert list((tmp_path / "theirs").iterdir()) == []


def test_a_relative_cache_would_lie_in_the_folder_that_is_checked(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pr").mkdir()
    monkeypatch.chdir(tmp_path / "pr")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    remember(key(base), VIEW)
    assert list((tmp_path / "pr").iterdir()) == []
    assert remembered(key(base)) == VIEW
    assert (tmp_path / "home" / ".cache" / "lora-probe" / "views" / f"{key(base)}.json").exists()


def _write_often(name: str, number: int) -> None:
    for _ in range(100):
        remember(name, EngineView("peft", "0.21", "x" * 100_000 * number, {}))


def test_two_writers_leave_a_whole_answer(base: Base, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(key(base), number)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        answer = remembered(key(base))
        if answer is not None:
            assert isinstance(answer, EngineView)
            seen.add(len(answer.model))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {100_000, 200_000}
    assert seen
    assert [file.name for file in place(tmp_path, "x").parent.iterdir()] == [f"{key(base)}.json"]


def test_nothing_is_kept_where_that_is_not_wanted(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_PROBE_NO_CACHE", "1")
    assert keys_of(base, ["peft"], TrainedAs()) == {"peft": None}
    remember(None, VIEW)
    assert remembered(None) is None
