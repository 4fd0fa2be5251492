"""A real adapter to damage, and the check for every damage: one clear error or a correct answer, nothing else."""

from __future__ import annotations

import contextlib
import io
import itertools
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conftest import save_adapter

from lora_probe.adapter import Adapter, open_adapter
from lora_probe.cli.main import main
from lora_probe.errors import ProbeError, UnreadableFile

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class World:
    """A real adapter in both formats, and a fresh folder for every mutation of it."""

    def __init__(self, root: Path, source: Path) -> None:
        from safetensors.torch import load_file

        self.root, self.numbers = root, itertools.count()
        self.config = (source / CONFIG).read_bytes()
        self.safetensors = (source / WEIGHTS).read_bytes()
        self.tensors = load_file(source / WEIGHTS)
        self.zipped, self.legacy = (self.pickled(self.tensors, legacy) for legacy in (False, True))

    @staticmethod
    def pickled(content: Any, legacy: bool = False) -> bytes:
        import torch

        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
        return buffer.getvalue()

    @contextlib.contextmanager
    def folder(self, weights: bytes, name: str = WEIGHTS, config: bytes | None = None) -> Iterator[Path]:
        folder = self.root / str(next(self.numbers))
        folder.mkdir()
        (folder / CONFIG).write_bytes(self.config if config is None else config)
        (folder / name).write_bytes(weights)
        yield folder
        shutil.rmtree(folder)


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, **records: bytes) -> bytes:
    """An archive as torch writes it, with a pickle of one's own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in ({"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"} | records).items():
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def pickled(path: Path, content: Any) -> Path:
    """A file of these bytes, or of this object as torch saves it."""
    import torch

    if isinstance(content, bytes | bytearray):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


def world_in(root: Path, base: Path) -> World:
    return World(root, save_adapter(root / "real", base, r=2, target_modules=["q_proj"]))


def opened(folder: Path) -> Adapter | ProbeError:
    try:
        return open_adapter(folder)
    except ProbeError as error:
        return error


def judge(folder: Path) -> str:
    """Open, read every value, inspect in every format: the error message, or nothing. Any other exception fails."""
    found = opened(folder)
    if isinstance(found, ProbeError):
        assert found.message.isprintable(), found.message
        assert len(found.message) < 700
        assert call("inspect", folder) == 2
        return found.message
    for tensor in found.weights.tensors.values():
        with contextlib.suppress(UnreadableFile):
            found.values(tensor)
    found.config.targeted([module.module for module in found.modules])
    found.digest()
    for form in (["--norms"], ["--format", "json"], ["--norms", "--format", "json"]):
        assert call("inspect", folder, *form) == 0
    for module in found.modules[:1]:
        assert call("inspect", folder, "--module", module.stored_as, "--format", "json") in (0, 2)
        assert call("inspect", folder, "--module", module.stored_as) in (0, 2)
    return ""


def call(*arguments: object) -> int:
    """The command line, with its output encoded as on a terminal."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main([str(argument) for argument in arguments])
    out.flush()
    return status
