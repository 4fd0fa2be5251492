"""A bug report in one file: what happened in a recorded run, without what was asked and answered.

In: a `Recording`. Out: a zip file: versions, configs, headers of the adapters, ledgers and load timeline. Prompts,
answers, token ids, rows and the engine's log are left out, and values of flags that look like secrets are removed.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from lora_probe.adapter import open_adapter
from lora_probe.errors import ProbeError
from lora_probe.recording import LoadEvent, Run
from lora_probe.render.document_markdown import markdown
from lora_probe.render.documents.recording import recording as document
from lora_probe.render.json.trace import recording_json
from lora_probe.render.results import Recording

ABOUT = """A bug report of lora-probe. It holds no prompts, answers, token ids, weights or log of the engine.

report.md            the report
environment.json     versions of Python and of the packages
run.json             what was run, without prompts; values of flags that look like secrets are removed
ledger.json          what became of each module in each load
processes/           settings of each process, and its load timeline
adapters/            the config of each adapter, and names and shapes of its tensors

Paths on this machine are in it. Look through it before you send it.
"""
ASKED = ("requests", "request_rows", "run", "events", "processes")
"""What JSON of a recording holds beside ledgers: what was asked, or what is in other files of the bundle."""
SECRET = re.compile(r"key|token(?!iz|s\b|s_)|secret|passw|pwd|bearer|credential|auth(?!or)", re.IGNORECASE)
USER_IN_ADDRESS = re.compile(r"(?<=://)[^/@\s\"]+@")
"""`user:password@` in an address."""
OF_LOADS = ("said", "requests")
"""Of a load, and of a finding about requests: lines of the engine's log, and the ids that clients sent."""
HIDDEN = "removed"
DATE = (1980, 1, 1, 0, 0, 0)


def write_bundle(result: Recording, target: Path, versions: dict[str, str]) -> None:
    """Write the zip file.

    Raises:
        ProbeError: it exists already, or cannot be written.
    """
    # A recording that still runs may change while it is read; nothing is written then.
    members = list(_members(result, versions))
    try:
        with target.open("xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in members:
                archive.writestr(zipfile.ZipInfo(name, DATE), USER_IN_ADDRESS.sub("", text), zipfile.ZIP_DEFLATED)
    except FileExistsError as error:
        raise ProbeError(f"`{target}` already exists", "use another name, or delete it") from error
    except OSError as error:
        raise ProbeError(f"cannot write `{target}`: {error.strerror or error}", "use another place") from error


def _members(result: Recording, versions: dict[str, str]) -> Iterator[tuple[str, str]]:
    trace = result.trace
    yield "README.txt", ABOUT
    yield "report.md", markdown(document(result, asked=False))
    yield "environment.json", _json(versions)
    if trace.run is not None:
        yield "run.json", _json(_without_prompts(trace.run))
    data = recording_json(result)
    yield "ledger.json", _json(_without({name: value for name, value in data.items() if name not in ASKED}))
    for process in trace.processes:
        settings = msgspec.to_builtins(process.process)
        yield f"processes/{process.folder.name}.json", _json(_without_secrets(settings))
        events = [msgspec.json.encode(event).decode() for event in process.of(LoadEvent)]
        yield f"processes/{process.folder.name}.events.jsonl", "\n".join(events)
    for load, _ in trace.loads:
        yield from _adapter(load.load, load.path)


def _adapter(number: int, path: str) -> Iterator[tuple[str, str]]:
    """The config of a load's adapter, and the headers of its tensors; or why they cannot be read any more."""
    folder = f"adapters/load-{number}"
    try:
        adapter = open_adapter(path)
    except ProbeError as error:
        yield f"{folder}/unreadable.txt", error.message
        return
    tensors = adapter.weights.tensors.values()
    header = {tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape)} for tensor in tensors}
    yield f"{folder}/adapter_config.json", _json(_without_secrets(dict(adapter.config.raw)))
    yield f"{folder}/tensors.json", _json(header)


def _without(data: Any) -> Any:
    """JSON without the fields of `OF_LOADS`."""
    if isinstance(data, dict):
        return {name: _without(value) for name, value in data.items() if name not in OF_LOADS}
    return [_without(value) for value in data] if isinstance(data, list) else data


def _without_prompts(run: Run) -> dict[str, Any]:
    """What was run: of prompts and forced tokens only how many there were."""
    data: dict[str, Any] = msgspec.to_builtins(run)
    spec = data["spec"]
    spec["prompts"] = len(run.spec.prompts)
    spec["continuation"] = None if run.spec.continuation is None else len(run.spec.continuation)
    spec["engine_args"] = _without_secret_flags(run.spec.engine_args)
    without: dict[str, Any] = _without_secrets(data)
    return without


def _without_secret_flags(words: list[str]) -> list[str]:
    """Flags of an engine: the values of `--api-key x y` or `--hf-token=x` are removed, and those inside JSON."""
    kept: list[str] = []
    secret = False
    for word in words:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            secret = bool(SECRET.search(flag)) and not equals
            kept.append(f"{flag}={_value(flag, value)}" if equals else word)
        else:
            kept.append(HIDDEN if secret else _value("", word))
    return kept


def _value(flag: str, value: str) -> str:
    """The value of a flag, without secrets if it is JSON."""
    if SECRET.search(flag):
        return HIDDEN
    try:
        data = json.loads(value)
    except ValueError:
        return value
    return json.dumps(_without_secrets(data)) if isinstance(data, dict | list) else value


def _without_secrets(data: Any) -> Any:
    """Settings whose names look like those of secrets lose their values, but for numbers and switches."""
    if isinstance(data, dict):
        return {
            name: HIDDEN
            if isinstance(value, str | list | dict) and value and SECRET.search(str(name))
            else _without_secrets(value)
            for name, value in data.items()
        }
    return [_without_secrets(value) for value in data] if isinstance(data, list) else data


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2, default=str)
