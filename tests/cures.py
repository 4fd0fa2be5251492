"""What hints advise, performed to the letter on a damaged adapter.

In: a `Patient`, and the words of its diagnostic's hint. Out: `ACTIONS`, each with the words for which it is performed;
`follow` performs every alternative that a hint offers, each on a copy of its own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file
from written import PREFIX, WEIGHTS

from lora_probe.cli.main import main
from lora_probe.rules import Diagnostic


@dataclass(frozen=True)
class Patient:
    """A damaged copy of `healthy`, and the diagnostic whose hint is followed. `options` are those of vLLM."""

    folder: Path
    healthy: Path
    base: Path
    diagnostic: Diagnostic
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return json.loads((self.folder / "adapter_config.json").read_text())  # type: ignore[no-any-return]

    @property
    def key(self) -> str:
        """The field that the diagnostic points at."""
        assert self.diagnostic.path == str(self.folder / "adapter_config.json")
        lines = (self.folder / "adapter_config.json").read_text().splitlines()
        assert self.diagnostic.line is not None
        match = re.match(r'\s*"(\w+)":', lines[self.diagnostic.line - 1])
        assert match is not None
        return match[1]

    def write(self, **fields: Any) -> None:
        (self.folder / "adapter_config.json").write_text(json.dumps(self.config | fields, indent=2))

    def remove(self, name: str) -> None:
        kept = {key: value for key, value in self.config.items() if key != name}
        (self.folder / "adapter_config.json").write_text(json.dumps(kept, indent=2))

    def rename(self, new: Callable[[str], str | None]) -> None:
        tensors = load_file(self.folder / WEIGHTS)
        renamed = {name: tensor for old, tensor in tensors.items() if (name := new(old)) is not None}
        save_file(renamed, self.folder / WEIGHTS)


Action = Callable[[Patient, re.Match[str]], None]
ACTIONS: dict[str, Action] = {}
"""What to do where a hint has these words. The words in groups are from the hint."""


def action(words: str) -> Callable[[Action], Action]:
    def register(perform: Action) -> Action:
        ACTIONS[words] = perform
        return perform

    return register


@action(r"`lora-probe check --fix -o FIXED/` does it|\(`lora-probe check --fix -o FIXED/`\)")
def _fix(patient: Patient, _: re.Match[str]) -> None:
    fixed = patient.folder.with_name("FIXED")
    assert main(["check", str(patient.folder), "--model", str(patient.base), "--fix", "-o", str(fixed)]) == 0
    shutil.rmtree(patient.folder)
    fixed.rename(patient.folder)


@action(r"restore the adapter_config\.json that was saved with these weights")
def _restore(patient: Patient, _: re.Match[str]) -> None:
    shutil.copy(patient.healthy / "adapter_config.json", patient.folder)


@action("add the modules to target_modules, by name or by path")
def _target(patient: Patient, _: re.Match[str]) -> None:
    assert patient.diagnostic.line is None or patient.key == "target_modules"
    patient.write(target_modules=[*(patient.config["target_modules"]), *patient.diagnostic.modules])


@action("change target_modules so that it matches these modules")
def _match(patient: Patient, _: re.Match[str]) -> None:
    assert patient.key == "target_modules"
    these = "|".join(map(re.escape, patient.diagnostic.modules))
    patient.write(target_modules=f"{patient.config['target_modules']}|{these}")


@action("change exclude_modules so that it does not match these modules")
def _include(patient: Patient, _: re.Match[str]) -> None:
    assert patient.key == "exclude_modules"
    excluded, modules = patient.config["exclude_modules"], patient.diagnostic.modules
    if isinstance(excluded, str):
        patient.write(exclude_modules=f"(?!(?:{'|'.join(map(re.escape, modules))})$){excluded}")
    else:
        patient.write(exclude_modules=[e for e in excluded if not any(f".{m}".endswith(f".{e}") for m in modules)])


@action("add their layers to layers_to_transform")
def _layers(patient: Patient, _: re.Match[str]) -> None:
    assert patient.key == "layers_to_transform"
    layers = {int(part) for module in patient.diagnostic.modules for part in module.split(".") if part.isdecimal()}
    patient.write(layers_to_transform=sorted({*patient.config["layers_to_transform"], *layers}))


@action(r"(?:or |^)remove (layers_pattern|layers_to_transform)")
def _remove_field(patient: Patient, named: re.Match[str]) -> None:
    assert patient.key == named[1]
    patient.remove(named[1])


@action("or write target_modules as a list of names")
def _list(patient: Patient, _: re.Match[str]) -> None:
    patient.write(target_modules=["q_proj", "k_proj", "v_proj"])


@action(r"write the modules of the file into target_modules: (.+)")
def _listed(patient: Patient, named: re.Match[str]) -> None:
    patient.write(target_modules=re.findall("`(.+?)`", named[1]))


@action('add `"peft_type": "LORA"`')
def _peft_type(patient: Patient, _: re.Match[str]) -> None:
    patient.write(peft_type="LORA")


@action("add the value that the adapter was trained with")
def _trained_value(patient: Patient, _: re.Match[str]) -> None:
    trained = json.loads((patient.healthy / "adapter_config.json").read_text())
    patient.write(**{key: trained[key] for key in re.findall("`(.+?)`", patient.diagnostic.message)})


@action(r"^write `(\w+)`")
def _word(patient: Patient, named: re.Match[str]) -> None:
    patient.write(**{patient.key: named[1]})


@action('^write "none"')
def _none(patient: Patient, _: re.Match[str]) -> None:
    patient.write(**{patient.key: "none"})


@action(r"write it as a whole number: (\d+)")
def _whole(patient: Patient, named: re.Match[str]) -> None:
    patient.write(**{patient.key: int(named[1])})


@action("^write null")
def _null(patient: Patient, _: re.Match[str]) -> None:
    patient.write(**{patient.key: None})


@action(r"or \{\} if no module has")
def _empty(patient: Patient, _: re.Match[str]) -> None:
    patient.write(**{patient.key: {}})


@action("write a number from 0 to 1")
def _share(patient: Patient, _: re.Match[str]) -> None:
    patient.write(**{patient.key: 0})


@action("set it to `true`")
def _true(patient: Patient, _: re.Match[str]) -> None:
    patient.write(**{patient.key: True})


@action("or remove the flag if it is from another run")
def _unset(patient: Patient, _: re.Match[str]) -> None:
    patient.remove(patient.key)


@action("delete the wrong one: engines use the last")
def _once(patient: Patient, _: re.Match[str]) -> None:
    path = patient.folder / "adapter_config.json"
    lines = path.read_text().splitlines()
    del lines[(patient.diagnostic.line or 0) - 1]
    path.write_text("\n".join(lines))


@action("correct or remove the pattern")
def _pattern(patient: Patient, _: re.Match[str]) -> None:
    idle = re.findall("`(.+?)`", patient.diagnostic.message)
    patient.write(**{patient.key: {k: v for k, v in patient.config[patient.key].items() if k not in idle}})


@action("keep one of the two")
def _one_of_two(patient: Patient, _: re.Match[str]) -> None:
    patient.rename(lambda name: name if name.count(PREFIX) == 1 else None)


@action(r"rename the endings of the keys to `(\w+)` or `(\w+)`")
def _ending(patient: Patient, named: re.Match[str]) -> None:
    modules = tuple(PREFIX + module for module in patient.diagnostic.modules)
    patient.rename(
        lambda name: re.sub(r"lora_([AB]).*", r"lora_embedding_\1", name) if name.startswith(modules) else name
    )
    assert {f"lora_embedding_{half}" for half in "AB"} == set(named.groups())


@action("if the module was not trained, add its path to exclude_modules")
def _exclude(patient: Patient, _: re.Match[str]) -> None:
    patient.write(exclude_modules=list(patient.diagnostic.modules))


@action("start vLLM with a larger --max-lora-rank: (.*)")
def _rank(patient: Patient, named: re.Match[str]) -> None:
    larger = [int(number) for number in re.findall(r"\d+", named[1])]
    patient.options["max_lora_rank"] = min(rank for rank in larger if rank > patient.options["max_lora_rank"])


@action("add the module to --lora-target-modules")
def _serve(patient: Patient, _: re.Match[str]) -> None:
    patient.options["lora_target_modules"] = [*patient.options["lora_target_modules"], *patient.diagnostic.modules]


@action("or remove the option")
def _plain(patient: Patient, _: re.Match[str]) -> None:
    del patient.options["lora_target_modules"]


def follow(patient: Patient) -> Iterator[tuple[str, Patient]]:
    """The words of each alternative, and the copy on which it was performed.

    Raises:
        AssertionError: nothing is known to do for the hint.
    """
    followed = False
    for number, (words, perform) in enumerate(ACTIONS.items()):
        if match := re.search(words, patient.diagnostic.hint):
            copy = shutil.copytree(patient.folder, patient.folder.with_name(f"{patient.folder.name}-{number}"))
            path = (patient.diagnostic.path or "").replace(str(patient.folder), str(copy))
            moved = replace(
                patient, folder=copy, diagnostic=replace(patient.diagnostic, path=path), options=dict(patient.options)
            )
            perform(moved, match)
            followed = True
            yield words, moved
    assert followed, f"nothing is known to do for {patient.diagnostic.hint!r}"
