"""`lora-probe inspect`: what an adapter checkpoint contains. In: options. Out: the exit status."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lora_probe.cli.ending import CLEAN
from lora_probe.cli.options import Command, add_checkpoint, add_limits, apply_limits
from lora_probe.files import limits
from lora_probe.render.console import hint, remarks
from lora_probe.render.formats import DEFAULT, present
from lora_probe.render.progress import progress_bar

if TYPE_CHECKING:
    from lora_probe.adapter import Adapter
    from lora_probe.adapter.spectrum import Spectrum


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
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


def _spectra(adapter: Adapter) -> dict[str, Spectrum | None]:
    """The spectrum of every module by its name in the file. None if A and B do not form a pair."""
    from lora_probe.adapter.spectrum import pair_spectrum
    from lora_probe.render.cells import size

    spectra = {}
    with progress_bar(f"reading {size(adapter.weights.size)} of values", len(adapter.modules)) as advance:
        for module in adapter.modules:
            spectra[module.stored_as] = pair_spectrum(adapter, module)
            advance()
    return spectra


COMMAND = Command(
    "inspect",
    "show what an adapter checkpoint contains",
    "  lora-probe inspect ckpt/\n"
    "  lora-probe inspect ckpt/ --norms\n"
    "  lora-probe inspect ckpt/ --module layers.5.self_attn.q_proj\n"
    "  lora-probe inspect ckpt/ --format json | jq '.modules | length'",
    add_arguments,
    run,
)
