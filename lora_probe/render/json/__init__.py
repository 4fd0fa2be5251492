"""JSON for programs, one file per command.

In: a command's result. Out: plain dictionaries with `schema_version`. The same things have the same shape in every
command. Fields may be added, none is removed.
"""

from __future__ import annotations

SCHEMA_VERSION = 1
