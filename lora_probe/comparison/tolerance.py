"""The dtype whose tolerance applies to two traces.

In: processes of the traces, and the dtypes that each of them recorded. Out: the coarsest of these, for
`precision.drift` and `precision.floor`. Traces are untrusted, so a dtype that is not in the table of `precision.py`
is an error with the path of the file.
"""

from __future__ import annotations

from collections.abc import Iterable

from lora_probe.errors import UnreadableFile
from lora_probe.files import shown
from lora_probe.precision import KNOWN, UnknownDtype, coarser, rounding
from lora_probe.recording import ProcessTrace

NOT_RECORDED_NOTE = "no dtype was recorded: the tolerance is that of the coarsest dtype, bfloat16"


def judged_dtype(recorded: Iterable[tuple[ProcessTrace, str]]) -> str:
    """The coarsest of the dtypes that processes recorded; `precision.NOT_RECORDED` if none was.

    Raises:
        UnreadableFile: a process.json contains a dtype for which lora-probe has no tolerance.
    """
    names = []
    for process, name in recorded:
        try:
            rounding(name)
        except UnknownDtype as error:
            raise UnreadableFile(
                f"`{process.folder / 'process.json'}` records the unknown dtype `{shown(name)}` (known: {KNOWN})",
                "upgrade lora-probe, or record the run in a known dtype",
            ) from error
        names.append(name)
    return coarser(*names)
