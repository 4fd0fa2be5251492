"""Untrusted bytes as tensors and JSON: the size of every file is bounded before its contents are used.

In: paths. Out: an open regular file (`untrusted`), JSON with its lines (`json_object`), the header and the values of
weights (`weights`, `pickled`), and the limits for reading them (`limits`, `guarded`, `isolation`).
"""

from __future__ import annotations

from lora_probe.files.untrusted import HEAD, brief, is_text, opened, sha256, shown, storage_of, wrong_file_type

__all__ = [
    "HEAD",
    "brief",
    "is_text",
    "opened",
    "sha256",
    "shown",
    "storage_of",
    "wrong_file_type",
]
