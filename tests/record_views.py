"""Records the engines' answers for the fast tests: `python tests/record_views.py [FOLDER]`, by default tests/data.

In: the bases of `BASES`, made by Transformers, and both engines. Out: for each base its files without the weights, the
shapes of the weights, and `views.json`: the views of real PEFT (for each task type) and real vLLM, or why they have
none. Also the config of an adapter as PEFT writes it. `test_recorded.py` compares the files in the repository with the
installed engines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgspec

DATA = Path(__file__).parent / "data"
TASKS = ("CAUSAL_LM", "", "SEQ_CLS", "causal_lm")
"""Of the Llama alone; PEFT takes the model's class from them. Empty: the config names none."""
LARGE = 300_000
"""Tokens: more than vLLM's kernel for an adapted output head takes."""


def make_bases(folder: Path) -> None:
    """Every base, with its weights where it has some."""
    from conftest import SIZES, save_base, save_paligemma
    from merges import save_model
    from transformers import NemotronHConfig

    for kind in ("llama", "qwen2"):
        save_base(folder / kind, kind)
    for kind in ("tied", "gpt2", "moe"):
        save_model(folder / kind, kind)
    save_paligemma(folder / "paligemma")
    hybrid = {"hybrid_override_pattern": "M*-", "head_dim": 32, "n_groups": 2}
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16}
    nemotron = NemotronHConfig(**SIZES | {"bos_token_id": 1}, **hybrid, **mamba)
    nemotron.architectures = ["NemotronHForCausalLM"]
    nemotron.save_pretrained(folder / "nemotron")
    (folder / "large").mkdir()
    config = json.loads((folder / "llama" / "config.json").read_text())
    write_json(folder / "large" / "config.json", config | {"vocab_size": LARGE})


def write_json(path: Path, content: Any) -> None:
    """One line for each object, so that a change can be read."""
    path.write_text(json.dumps(content, sort_keys=True).replace("}, ", "},\n") + "\n")


def ask(engine: str, bases: Path, answers: Path) -> None:
    """The answers of one engine, in a process of its own: {base: {task: view or words}}."""
    from lora_probe.adapter import TrainedAs
    from lora_probe.base import open_base
    from lora_probe.engines import make
    from lora_probe.errors import ProbeError

    found: dict[str, dict[str, Any]] = {}
    # vLLM makes its process groups once, for the first model: experts need one more than other models do.
    for folder in sorted(bases.iterdir(), key=lambda folder: (folder.name != "moe", folder.name)):
        tasks = TASKS if engine == "peft" and folder.name == "llama" else TASKS[:1]
        for task in tasks:
            try:
                answer = msgspec.to_builtins(make(engine).describe(open_base(str(folder)), TrainedAs(task or None)))
                # What is recorded is what an engine has, whatever the version that was asked.
                answer["version"] = ""
            except ProbeError as error:
                answer = error.message.replace(str(folder), "FOLDER")
            found.setdefault(folder.name, {})[task] = answer
    write_json(answers, found)


def record(target: Path) -> None:
    """All of it, into `target`."""
    from conftest import save_adapter

    with tempfile.TemporaryDirectory() as name:
        bases = Path(name) / "bases"
        bases.mkdir()
        make_bases(bases)
        answers = {}
        for engine in ("peft", "vllm"):
            path = Path(name) / f"{engine}.json"
            environment = os.environ | {"HF_HUB_OFFLINE": "1"}
            command = [sys.executable, __file__, engine, str(bases), str(path)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            answers[engine] = json.loads(path.read_text())
        for folder in bases.iterdir():
            keep(folder, target / folder.name)
            write_json(target / folder.name / "views.json", {name: answers[name][folder.name] for name in answers})
        adapter = save_adapter(Path(name) / "adapter", bases / "llama")
        config = json.loads((adapter / "adapter_config.json").read_text())
        write_json(target / "adapter_config.json", config | {"base_model_name_or_path": None})


def keep(folder: Path, target: Path) -> None:
    """The files of a base, and the shapes of its weights in place of these."""
    from safetensors import safe_open

    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
            (target / "shapes.json").write_text(json.dumps(shapes, sort_keys=True).replace("], ", "],\n") + "\n")
        elif "token" not in path.name and path.name != "chat_template.jinja":
            (target / path.name).write_bytes(path.read_bytes())
        elif folder.name == "llama":
            # One tokenizer for all, whose tokens are bytes.
            (target.parent / "tokenizer").mkdir(exist_ok=True)
            (target.parent / "tokenizer" / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    if len(sys.argv) > 2:
        ask(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        record(Path(sys.argv[1]) if sys.argv[1:] else DATA)
