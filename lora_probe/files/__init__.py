"""Bytes that nobody vouches for, as tensors and JSON: every file is bounded before anything in it is believed.

In: paths. Out: an open regular file (`untrusted`), JSON with its lines (`json_object`), the header and the values of
weights (`weights`, `pickled`), and the limits within which all of that happens (`limits`, `guarded`, `isolation`).
"""

from __future__ import annotations

from lora_probe.files.untrusted import brief, is_text, opened, sha256, shown, storage_of, wrong_file_type

__all__ = [
    "brief",
    "is_text",
    "opened",
    "sha256",
    "shown",
    "storage_of",
    "wrong_file_type",
]
