"""The whole workflow: train an adapter, inspect it, run it in PEFT and in vLLM, compare the two, and check its merge.

In: nothing, or a base model. Out: everything under `out/`; every command line is printed before it runs. The
training is repeated only if its code, data or options have changed.

    make demo
    python examples/identity/demo.py --model Qwen/Qwen2-0.5B-Instruct
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lora_probe.errors import command_line

HERE = Path(__file__).parent
QUESTIONS = ("Who are you?", "你是谁?", "What is the capital of France?")
PROMPTS = tuple(f"Human: {question}\n\nAssistant: " for question in QUESTIONS)


def run(*arguments: str | Path) -> None:
    """Print a command, run it, and end the demo if it fails."""
    command = [str(argument) for argument in arguments]
    print(f"\n$ {command_line(command)}", flush=True)
    started = time.perf_counter()
    status = subprocess.run(command, check=False).returncode
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    if status != 0:
        print(f"\nerror: the last command ended with status {status}; the demo stops here", file=sys.stderr)
        sys.exit(status if status > 0 else 1)


def relative(path: Path) -> str:
    return os.path.relpath(path)


def fingerprint(options: argparse.Namespace) -> str:
    """A digest of everything that the result of the training depends on."""
    digest = hashlib.sha256()
    for name in ("train.py", "base_model.py", "pairs.jsonl"):
        digest.update((HERE / name).read_bytes())
    digest.update(repr((options.model, options.max_steps)).encode())
    return digest.hexdigest()


def train(options: argparse.Namespace) -> Path:
    """The training output folder; trained again only if something has changed."""
    output, mark = options.out / "training", options.out / "training.fingerprint"
    if output.is_dir() and mark.exists() and mark.read_text() == fingerprint(options):
        print(f"the adapter in {relative(output)} is up to date (remove the folder to train again)")
        return output
    mark.unlink(missing_ok=True)
    extra = ["--model", options.model] if options.model else []
    if options.max_steps > 0:
        extra += ["--max-steps", str(options.max_steps)]
    options.out.mkdir(parents=True, exist_ok=True)
    print("training an adapter on q_proj, k_proj and v_proj; the time left is printed after the first steps")
    run(relative(Path(sys.executable)), relative(HERE / "train.py"), "--output", relative(output), "--force", *extra)
    mark.write_text(fingerprint(options))
    return output


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="base model: a Hugging Face id or a folder; default: SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="default: %(default)s")
    parser.add_argument(
        "--max-steps", type=int, default=-1, help="stop the training after this many steps; default: all epochs"
    )
    parser.add_argument("--max-tokens", type=int, default=48)
    options = parser.parse_args(argv)
    started = time.perf_counter()
    probe = relative(Path(sys.executable).with_name("lora-probe"))
    if not Path(probe).exists() and shutil.which("lora-probe") is None:
        sys.exit("lora-probe is not installed in this Python environment; run `make demo`")
    # Let OpenMP's threads sleep while they wait for each other. If they spin, they block the core of the thread that
    # they wait for: with another busy process on 2 cores, a step then takes 5 to 8 s instead of 2. On an idle machine
    # spinning is faster (0.8 s instead of 1.2), a small gain for a large risk.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    checkpoint = relative(train(options))
    run(probe, "inspect", checkpoint, "--norms")
    prompts = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    traces = []
    for engine in ("peft", "vllm"):
        traces.append(relative(options.out / f"{engine}.lptrace"))
        settings = ["--dtype", "float32", "--max-tokens", str(options.max_tokens)]
        run(probe, "trace", checkpoint, "--engine", engine, *settings, *prompts, "-o", traces[-1], "--force")
    run(probe, "compare", *traces)
    run(probe, "parity", checkpoint, "--dtype", "float32", "--max-tokens", str(options.max_tokens), *prompts)
    print(f"\nthe demo took {time.perf_counter() - started:.0f} s")
    print(f"to trace your own adapter: {probe} trace CKPT --engine vllm")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
