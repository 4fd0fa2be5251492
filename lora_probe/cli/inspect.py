"""`lora-probe inspect`: what an adapter checkpoint contains, or how two of them differ.

In: options. Out: the exit status.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN, FOUND
from lora_probe.cli.options import Command, UsageError, add_checkpoint, add_limits, apply_limits
from lora_probe.files import limits
from lora_probe.files.threads import one_blas_thread
from lora_probe.render.console import hint, remarks
from lora_probe.render.formats import DEFAULT, present
from lora_probe.render.progress import progress_bar

if TYPE_CHECKING:
    from lora_probe.adapter import Adapter
    from lora_probe.adapter.spectrum import Spectrum


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "other", nargs="?", metavar="OTHER", help="a second adapter: what is the same in both, what differs, and how"
    )
    parser.add_argument(
        "--norms", action="store_true", help="read the values: ‖s·B·A‖ and effective rank of each module"
    )
    parser.add_argument(
        "--module", metavar="NAME", help="show one module with its values; NAME is its path, or the unique end of it"
    )
    add_limits(parser)


def run(options: argparse.Namespace) -> int:
    from lora_probe.adapter import located, open_adapter
    from lora_probe.render.results import Inspection

    apply_limits(options)
    one_blas_thread()
    if options.other is not None:
        return _side_by_side(options)
    limits.begin(located(Path(options.checkpoint)))
    adapter = open_adapter(options.checkpoint)
    if options.format == DEFAULT:
        remarks(adapter.notes)
    if options.module is not None:
        from lora_probe.adapter.one_module import select

        present("inspect --module", options.format, select(adapter, options.module))
        return CLEAN
    present("inspect", options.format, Inspection(adapter, _spectra(adapter) if options.norms else None))
    if options.format == DEFAULT and not options.norms:
        hint(f"lora-probe inspect {adapter.path} --norms")
    return CLEAN


def _side_by_side(options: argparse.Namespace) -> int:
    """Two adapters: 1 if they differ."""
    from lora_probe.adapter import located, open_adapter
    from lora_probe.adapter.side_by_side import side_by_side

    if options.module is not None or options.norms:
        raise UsageError("--norms and --module are for one adapter", "pass one folder, or remove the option")
    folders = [located(Path(folder)) for folder in (options.checkpoint, options.other)]
    limits.begin(*folders)
    first, second = map(open_adapter, folders)
    if options.format == DEFAULT:
        remarks((*first.notes, *second.notes))
    with progress_bar("comparing", len(first.modules)) as advance:
        diff = side_by_side(first, second, advance)
    present("inspect A B", options.format, diff)
    return CLEAN if diff.same else FOUND


def _spectra(adapter: Adapter) -> dict[str, Spectrum | None]:
    """The spectrum of every module by its name in the file."""
    from lora_probe.adapter.spectrum import spectra_of
    from lora_probe.render.cells import size

    with progress_bar(f"reading {size(adapter.weights.size)} of values", len(adapter.modules)) as advance:
        return spectra_of(adapter, advance)


COMMAND = Command(
    "inspect",
    "show what an adapter checkpoint contains, or how two of them differ",
    "  lora-probe inspect ckpt/\n"
    "  lora-probe inspect ckpt/ --norms\n"
    "  lora-probe inspect ckpt/ --module layers.5.self_attn.q_proj\n"
    "  lora-probe inspect checkpoint-100/ checkpoint-200/\n"
    "  lora-probe inspect ckpt/ --format json | jq '.modules | length'",
    add_arguments,
    run,
)
