"""`trace_server`: an adapter in a running server, from its answers alone.

In: a URL, the adapter's name there, and its folder if it is at hand. Out: a `Trace` with an `Outcome`. Nothing is
installed in the server, and it is not restarted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lora_probe.adapter import located
from lora_probe.engines import require
from lora_probe.engines.child import Progress
from lora_probe.engines.folder import folder_for
from lora_probe.engines.launch import base_of, record_run, refuse_invalid, runnable
from lora_probe.engines.prompts import BUILT_IN
from lora_probe.errors import ProbeError, words_of
from lora_probe.files import limits
from lora_probe.recording import Prompt, RunSpec, Trace

PASSES = 2
"""Answers to a prompt: one with the adapter and one without."""
REQUEST_SECONDS = 120.0


def trace_server(
    url: str,
    adapter: str,
    *,
    checkpoint: str | Path | None = None,
    model: str | None = None,
    served_base: str | None = None,
    prompts: str | Sequence[str] = (),
    chat: bool = False,
    max_tokens: int = 32,
    out: str | Path | None = None,
    force: bool = False,
    dtype: str = "auto",
    request_timeout: float = REQUEST_SECONDS,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Trace:
    """Ask an OpenAI-compatible server what the adapter that it serves as `adapter` does.

    Base model and adapter get the same tokens, each twice. With `checkpoint`, the adapter's folder, PEFT runs these
    tokens as well (base model `model`, in `dtype`), and the outcome states whether the server runs this adapter: as
    trained, not at all, at another scaling, or another one. A key is read from OPENAI_API_KEY. `served_base` is the
    base model's name in the server, if the server does not state it.

    Raises:
        ProbeError: bad input, or an existing `out` without `force`.
        EngineFailed: the server cannot be reached, does not serve the adapter, or returns no log-probabilities.
    """
    # httpx takes a moment to import.
    from lora_probe.engines.server.client import checked_url

    if max_tokens < 1:
        raise ProbeError(f"--max-tokens must be at least 1, not {max_tokens}")
    if chat and checkpoint is None:
        raise ProbeError("--chat needs the adapter's folder, whose base model has the chat template", "pass CKPT")
    wanted = list(map(Prompt, words_of("prompts", prompts) or BUILT_IN))
    refuse_invalid(wanted)
    options = {"url": checked_url(url), "request_timeout": request_timeout, "dtype": dtype}
    if served_base is not None:
        options["served_base"] = served_base
    path, base = None, model or ""
    if checkpoint is not None:
        limits.begin(located(Path(checkpoint)))
        files = runnable(checkpoint)
        path, base = str(files.path.resolve()), base_of(files, model)
    require("server")
    spec = RunSpec(
        engine="server",
        adapter=path,
        name=adapter,
        model=base,
        prompts=wanted,
        max_tokens=max_tokens,
        keep="events",
        options=options,
        chat=chat,
    )
    name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in adapter)
    return record_run(folder_for(name or "adapter", "server", out, force), spec, PASSES * len(wanted), progress)
