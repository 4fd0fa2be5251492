"""`lora-probe parity`: a merged model against its base and adapter.

In: options. Out: the comparison on standard output, with `--output` also its files, and the exit status.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lora_probe.cli.ending import CLEAN, FOUND
from lora_probe.cli.options import (
    Command,
    add_checkpoint,
    add_engine,
    add_limits,
    add_prompts,
    apply_limits,
    engine_options,
    prompts,
)
from lora_probe.errors import ProbeError, command_line
from lora_probe.files.threads import one_blas_thread
from lora_probe.render.console import as_json, hint, note, remarks
from lora_probe.render.formats import DEFAULT, present
from lora_probe.render.progress import run_progress, status_line, weights_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--merged", metavar="DIR", help="the merged model; default: PEFT merges the adapter, in the dtype of --dtype"
    )
    parser.add_argument(
        "--weights-only",
        action="store_true",
        help="compare the files without running an engine (with --merged, torch is not needed)",
    )
    parser.add_argument("--engine", metavar="ENGINE", help="engine that runs both models; default: peft")
    add_prompts(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="keep the merged model, both traces (see `show`) and parity.json here"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the output of an earlier parity")
    add_engine(
        parser, "of the merge by PEFT, and of both runs; default: the dtype that the base or merged model is stored in"
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    one_blas_thread()
    from lora_probe.merging.parity import REPORT, parity

    _refuse_ignored(options)
    kept = options.output
    partial = f"; `{kept}` is incomplete, --force overwrites it" if kept else ""
    apply_limits(options, f"nothing is left running{partial}")
    with status_line("looking at the files") as report:
        result = parity(
            options.checkpoint,
            model=options.model,
            merged=options.merged,
            engine=options.engine or "peft",
            weights_only=options.weights_only,
            prompts=prompts(options),
            chat=options.chat,
            max_tokens=options.max_tokens,
            out=options.output,
            force=options.force,
            options=engine_options(options),
            engine_args=options.engine_args,
            weights_progress=weights_progress(report),
            engine_progress=lambda name, now: run_progress(name, report)(now),
        )
    if options.format == DEFAULT:
        remarks(result.weights.notes)
    present("parity", options.format, result)
    if kept:
        from lora_probe.render.json.parity import parity_json

        (Path(kept) / REPORT).write_text(as_json(parity_json(result)), encoding="utf-8")
        names = ", ".join(sorted(path.name for path in Path(kept).iterdir()))
        note(f"kept in {kept}: {names}")
    if options.weights_only and result.verdict != "differs":
        again = command_line(["lora-probe", *(word for word in options.own_arguments if word != "--weights-only")])
        hint(f"to compare the outputs as well: {again}")
    return CLEAN if result.verdict == "verified" else FOUND


def _refuse_ignored(options: argparse.Namespace) -> None:
    """Options of runs that do not take place. Whoever passed them expects something else.

    Raises:
        ProbeError: there are some.
    """
    if not options.weights_only:
        return
    ignored = ["--engine"] if options.engine is not None else []
    ignored += [f"--{name.replace('_', '-')}" for name in ("prompt", "prompt_file", "chat") if getattr(options, name)]
    ignored += ["--dtype"] if options.dtype and options.merged else []
    ignored += ["flags after --"] if options.engine_args else []
    if ignored:
        raise ProbeError(
            f"no engine runs with --weights-only, so it cannot be combined with {', '.join(ignored)}",
            "remove these options, or --weights-only",
        )


COMMAND = Command(
    "parity",
    "check a merged model: are its weights base plus adapter, and are its outputs the same",
    "  lora-probe parity ckpt/ --dtype bfloat16\n"
    "  lora-probe parity ckpt/ --merged merged/ --weights-only\n"
    "  lora-probe parity ckpt/ --merged merged/ --engine vllm --prompt 'Who are you?'\n"
    "  lora-probe parity ckpt/ --merged merged/ --weights-only --format json | jq -r .verdict",
    add_arguments,
    run,
    engine_flags=True,
)
