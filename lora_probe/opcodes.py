"""A pickle looked at before it is loaded: what torch's weights-only loader would do with it, and what it would cost.

In: the bytes of a pickle. Out: nothing, or an `UnreadableFile`. The weights-only loader runs no code of the file, but
it believes it: a `bytearray` of any size is made, and a tuple nested a hundred thousand deep, once it is hashed, takes
the process down with it. Only depths and counts are kept here, nothing is built.
"""

from __future__ import annotations

import struct
from pathlib import Path

from lora_probe.errors import UnreadableFile

MAX_DEPTH = 100
"""A state dict has 6: dict, arguments, storage."""
MAX_STRING = 1_000_000

_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_FIXED = {
    **dict.fromkeys(b")]}\x8f", ("", 0)),
    **dict.fromkeys(b"N\x88\x89", ("", 0)),
    ord("K"): ("", 1),
    ord("M"): ("", 2),
    ord("J"): ("", 4),
    ord("G"): ("", 8),
}
"""What pushes one plain thing, and how many bytes follow: ) ] } \\x8f, N True False, integers and floats."""


class _Refused(Exception):
    pass


def require_harmless(data: bytes, path: Path, count: int = 1) -> None:
    """Follow the first `count` pickles in `data`, one behind the other.

    Raises:
        UnreadableFile: it calls something that can take any amount of memory, is nested too deep, or breaks off.
    """
    try:
        at = 0
        for _ in range(count):
            at = _follow(data, at)
    except _Refused as error:
        raise UnreadableFile(
            f"torch's weights-only loader refuses `{path}`: {error}",
            "no save of weights writes this: do not load it anywhere",
        ) from None
    except (IndexError, struct.error) as error:
        raise UnreadableFile(
            f"`{path}` is a damaged pickle: it breaks off or its stack runs empty", "copy or download it again"
        ) from error


def _follow(data: bytes, at: int) -> int:
    """Where the pickle ends. On the stack is the depth of everything there, 0 for a plain value."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    while True:
        code = data[at]
        at += 1
        if code in _FIXED:
            stack.append(0)
            at += _FIXED[code][1]
        elif code in _TUPLES:
            count = _TUPLES[code]
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [_deeper(stack[-count:])]
        elif code == 0x28:  # MARK
            marks.append(len(stack))
        elif code == 0x74:  # TUPLE
            mark = marks.pop()
            stack[mark:] = [_deeper(stack[mark:])]
        elif code in (0x65, 0x75):  # APPENDS, SETITEMS
            mark = marks.pop()
            inner = stack[mark:]
            del stack[mark:]
            stack[-1] = max(stack[-1], _deeper(inner))
        elif code in (0x61, 0x62, 0x73, 0x52, 0x81):  # APPEND, BUILD, SETITEM, REDUCE, NEWOBJ
            count = 2 if code == 0x73 else 1
            inner = stack[-count:]
            del stack[-count:]
            stack[-1] = max(stack[-1], _deeper(inner))
        elif code == 0x51:  # BINPERSID
            stack[-1] = 0
        elif code == 0x58:  # BINUNICODE
            (length,) = struct.unpack_from("<I", data, at)
            if length > MAX_STRING:
                raise _Refused(f"it holds a string of {length} bytes")
            at += 4 + length
            stack.append(0)
        elif code in (0x55, 0x8A):  # SHORT_BINSTRING, LONG1
            at += 1 + data[at]
            stack.append(0)
        elif code in (0x68, 0x6A, 0x71, 0x72):  # BINGET, LONG_BINGET, BINPUT, LONG_BINPUT
            short = code in (0x68, 0x71)
            index = data[at] if short else struct.unpack_from("<I", data, at)[0]
            at += 1 if short else 4
            if code in (0x71, 0x72):
                memo[index] = stack[-1]
            elif index not in memo:
                raise IndexError
            else:
                stack.append(memo[index])
        elif code == 0x63:  # GLOBAL
            module, at = _line(data, at)
            name, at = _line(data, at)
            if (module, name) in ((b"builtins", b"bytearray"), (b"__builtin__", b"bytearray")):
                raise _Refused("it makes a `bytearray`, of whatever size it likes")
            stack.append(0)
        elif code == 0x80:  # PROTO
            at += 1
        elif code == 0x2E:  # STOP
            return at
        else:
            # Torch's loader knows no other, and refuses this one in its own words.
            return at - 1


def _deeper(inner: list[int]) -> int:
    depth = 1 + max(inner, default=0)
    if depth > MAX_DEPTH:
        raise _Refused(f"it is nested more than {MAX_DEPTH} deep")
    return depth


def _line(data: bytes, at: int) -> tuple[bytes, int]:
    end = data.find(b"\n", at, at + 1000)
    if end < 0:
        raise IndexError
    return data[at:end], end + 1
