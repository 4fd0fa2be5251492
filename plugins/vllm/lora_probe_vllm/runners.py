"""vLLM's two model runners: which one an engine has, how it runs its steps, and how one step is run eager.

In: a runner, and the engine's configuration. Out: `Running`, what a recording has to know; and a block in which the
runner neither replays a captured graph nor calls compiled code. vLLM has a switch for each of the two, and uses both
for the encoder steps of encoder-decoder models.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_probe_vllm.seams import NAMES, Patches, SeamMoved, model_of, seams

RUNNERS = {"V1": "v1_runner", "V2": "v2_runner"}
"""vLLM's names of its model runners, and those of their classes in `seams.py`."""
PIN_V1 = "VLLM_USE_V2_MODEL_RUNNER"


@dataclass(frozen=True)
class Running:
    """`runner` is V1 or V2, None for a class that the probe does not know. `compiled` is how steps run without Python;
    None in an eager engine."""

    runner: str | None
    described: str
    compiled: str | None

    def settings(self, every: int | None) -> dict[str, Any]:
        """For process.json. `every` is the value of LORA_PROBE_SAMPLE."""
        return {"model_runner": self.runner or self.described, "compiled": self.compiled, "sample": every}

    def why_not(self, sampling: bool) -> str | None:
        """Why this engine's contributions cannot be recorded; None if they can. With `sampling`, some steps are run
        eager."""
        if self.runner is None:
            return (
                f"the probe does not support the model runner {self.described}; set {PIN_V1}=0 to use vLLM's V1 runner"
            )
        if self.compiled is not None and not sampling:
            return (
                f"the engine {self.compiled}; set LORA_PROBE_SAMPLE=200 to run one step in 200 eager, "
                "or start the engine with --enforce-eager"
            )
        return None


def running(vllm_config: Any, runner: Any) -> Running:
    """How this engine runs its steps."""
    kind = next((name for name, seam in RUNNERS.items() if _is(runner, seam)), None)
    return Running(kind, f"{type(runner).__module__}.{type(runner).__name__}", _compiled(vllm_config))


def supported() -> tuple[dict[str, Any], list[SeamMoved]]:
    """The runner classes that this vLLM has with all of their names; and the names that moved in the others."""
    classes, moved = {}, []
    for name, seam in RUNNERS.items():
        try:
            classes[name] = getattr(seams, seam)
        except SeamMoved as error:
            moved.append(error)
    return classes, moved


def pin_v1() -> str | None:
    """Set the variable that makes vLLM choose the V1 runner if it is the only one whose steps can be read, unless the
    user has set it. Returns why, None if nothing was set. To be called before an engine is started."""
    classes, moved = supported()
    if "V2" in classes or "V1" not in classes or PIN_V1 in os.environ:
        return None
    os.environ[PIN_V1] = "0"
    return f"{PIN_V1}=0, as {moved[0].message}"


def _is(runner: Any, seam: str) -> bool:
    try:
        return isinstance(runner, getattr(seams, seam))
    except SeamMoved:
        return False


def _compiled(vllm_config: Any) -> str | None:
    """Compiled or captured steps do not run Python, so a probe that waits to be called sees nothing there."""
    if vllm_config.model_config.enforce_eager:
        return None
    compilation = vllm_config.compilation_config
    ways = []
    for name, what in (("mode", "compiles its model"), ("cudagraph_mode", "replays captured graphs")):
        value = getattr(compilation, name, None)
        mode = getattr(value, "name", str(value))
        if mode not in ("NONE", "None", "0"):
            ways.append(f"{what} ({name} {mode})")
    return " and ".join(ways) or None


@contextmanager
def eager_step(runner: Any, kind: str) -> Iterator[None]:
    """Within this block the runner's step runs without captured graphs and without compiled code."""

    def skip_compiled(model: Any, args: Any) -> None:
        # The context of this forward pass alone. Every compiled part of the model reads it.
        seams.forward_context().skip_compiled = True

    with Patches() as patches:
        if kind == "V2":
            # The module of the runner has imported the function by name.
            module, name = NAMES["v2_dispatch"]
            patches.wrap(sys.modules[module], name, _with("need_eager"))
        else:
            patches.wrap(runner, "_determine_batch_execution_and_padding", _with("force_eager"))
        patches.callback(model_of(runner).register_forward_pre_hook(skip_compiled).remove)
        yield


def _with(flag: str) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **{**kwargs, flag: True})

        return wrapper

    return make
