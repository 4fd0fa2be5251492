"""A pickle checked before it is loaded: what torch's weights-only loader would do with it, and at what cost.

In: the bytes of a pickle. Out: nothing, or an `UnreadableFile`. The weights-only loader executes no code from the file,
but trusts its contents: it creates a `bytearray` of any size; hashing a tuple nested a hundred thousand levels deep
crashes the process; and hashing a tuple that holds another one twice, for sixty levels, takes forever. Only depths and
counts are tracked here, no objects are created.
"""

from __future__ import annotations

import struct
from pathlib import Path

from lora_probe.errors import UnreadableFile

MAX_DEPTH = 100
"""Nesting levels; a state dict has 6: dict, arguments, storage."""
MAX_SIZE = 200
"""Values in a tuple, including those of tuples and lists inside it, each counted as often as it occurs. The arguments
of a tensor with 64 axes are 140."""
MAX_STRING = 1_000_000

# Each object on the stack is one number: a depth, two flags, and a size. Adding numbers is fast.
_MANY = 10 * MAX_SIZE
"""The value of larger sizes, so that they never add up to a flag."""
_NO_KEY, _LIST, _LEVEL = 1 << 40, 1 << 41, 1 << 42
"""The flags for objects that are refused as dictionary keys (tuples; long numbers, many of which can have one hash) and
for lists, and one level of depth."""
_PLAIN = 1
"""A depth of 0 and a size of 1. Dictionaries and objects have this size too: nothing iterates over their contents."""

_FIXED = {
    **dict.fromkeys(b")}\x8fN\x88\x89", (_PLAIN, 0)),
    ord("]"): (_PLAIN | _LIST, 0),
    ord("K"): (_PLAIN, 1),
    ord("M"): (_PLAIN, 2),
    ord("J"): (_PLAIN, 4),
    ord("G"): (_PLAIN, 8),
}
"""Opcodes that push one object, and how many bytes follow: ) } \\x8f, N True False, ], integers and floats."""
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}
_COMBINING = {0x74, 0x65, 0x75, 0x61, 0x62, 0x73, 0x52, 0x81} | _TUPLES.keys()
"""TUPLE, APPENDS, SETITEMS, APPEND, BUILD, SETITEM, REDUCE, NEWOBJ: opcodes that pop from the stack."""
_BUILTINS = (b"builtins", b"__builtin__")
_OWN = (b"torch", b"collections", b"_codecs", *_BUILTINS)
"""Modules of the names that torch's loader accepts."""


class _Refused(Exception):
    pass


def require_harmless(data: bytes, path: Path, count: int = 1) -> None:
    """Check the first `count` pickles in `data`, which follow each other.

    Raises:
        UnreadableFile: one can take any amount of memory or time, is nested too deep, or is truncated.
    """
    try:
        at = 0
        for _ in range(count):
            at = _follow(data, at)
    except _Refused as error:
        raise UnreadableFile(
            f"torch's weights-only loader refuses `{path}`: {error}",
            "never load this file: no library writes weights like this",
        ) from None
    except (IndexError, struct.error) as error:
        raise UnreadableFile(
            f"`{path}` is a damaged pickle: it is truncated or its stack runs empty", "copy or download it again"
        ) from error


def _follow(data: bytes, at: int) -> int:
    """The position at which the pickle ends."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    foreign = False
    while True:
        code = data[at]
        at += 1
        if code in _FIXED:
            value, length = _FIXED[code]
            stack.append(value)
            at += length
        elif code in (0x68, 0x6A, 0x71, 0x72):  # BINGET, LONG_BINGET, BINPUT, LONG_BINPUT
            short = code in (0x68, 0x71)
            index = data[at] if short else struct.unpack_from("<I", data, at)[0]
            at += 1 if short else 4
            if code in (0x71, 0x72):
                # A list may be filled after it is remembered.
                memo[index] = stack[-1] | _MANY if stack[-1] & _LIST else stack[-1]
            elif index not in memo:
                raise IndexError
            else:
                stack.append(memo[index])
        elif code == 0x58:  # BINUNICODE
            (length,) = struct.unpack_from("<I", data, at)
            if length > MAX_STRING:
                raise _Refused(f"it holds a string of {length} bytes")
            at += 4 + length
            stack.append(_PLAIN)
        elif code == 0x28:  # MARK
            marks.append(len(stack))
        elif code in _COMBINING:
            _combine(code, stack, marks)
        elif code == 0x51:  # BINPERSID
            stack[-1] = _PLAIN
        elif code in (0x55, 0x8A):  # SHORT_BINSTRING, LONG1
            at += 1 + data[at]
            stack.append(_PLAIN if code == 0x55 else _PLAIN | _NO_KEY)
        elif code == 0x63:  # GLOBAL
            module, at = _line(data, at)
            name, at = _line(data, at)
            _require_harmless_name(module, name, foreign)
            foreign = foreign or _is_foreign(module)
            stack.append(_PLAIN)
        elif code == 0x80:  # PROTO
            at += 1
        elif code == 0x2E:  # STOP
            return at
        else:
            # torch's loader accepts no other opcode, and refuses this one with its own message.
            return at - 1


def _combine(code: int, stack: list[int], marks: list[int]) -> None:
    """Combine the top of the stack into a tuple, or add it to the object below it."""
    if code in _TUPLES:
        begin = len(stack) - _TUPLES[code]
    elif code in (0x74, 0x65, 0x75):  # TUPLE, APPENDS, SETITEMS
        begin = marks.pop()
    else:
        begin = len(stack) - (2 if code == 0x73 else 1)
    if begin < 0:
        raise IndexError
    inner = stack[begin:]
    del stack[begin:]
    depth = (max(inner, default=0) // _LEVEL + 1) * _LEVEL
    if depth > MAX_DEPTH * _LEVEL:
        raise _Refused(f"it is nested more than {MAX_DEPTH} levels deep")
    size = min(sum(inner) % _NO_KEY, _MANY)
    if code in (0x74, 0x85, 0x86, 0x87, 0x52, 0x81) and size > MAX_SIZE:  # a tuple, or the arguments of a call
        raise _Refused(f"it holds a tuple of more than {MAX_SIZE} values, each counted as often as it occurs")
    if code == 0x74 or code in _TUPLES:
        stack.append(depth + _NO_KEY + size + 1)
        return
    if code in (0x73, 0x75) and any(key & _NO_KEY for key in inner[::2]):
        raise _Refused("a dictionary key in it is a tuple or a very long number")
    depth = max(stack[-1] // _LEVEL * _LEVEL, depth)
    if code in (0x61, 0x65):  # APPEND, APPENDS
        stack[-1] = depth + _LIST + min(stack[-1] % _NO_KEY + size, _MANY)
    else:
        stack[-1] = depth + _PLAIN


def _require_harmless_name(module: bytes, name: bytes, foreign: bool) -> None:
    """`foreign`: an earlier name is one that torch does not accept. torch refuses that one with its own message and
    never reaches this one."""
    if module in _BUILTINS and name == b"bytearray":
        raise _Refused("it creates a `bytearray` of any size")
    if module in _BUILTINS and name in (b"set", b"frozenset", b"complex") and not foreign:
        raise _Refused(f"it creates a `{name.decode()}`, which weights do not need and which may take forever to hash")


def _is_foreign(module: bytes) -> bool:
    return module.partition(b".")[0] not in _OWN or module.startswith(b"torch.nn.modules")


def _line(data: bytes, at: int) -> tuple[bytes, int]:
    end = data.find(b"\n", at, at + 1000)
    if end < 0:
        raise IndexError
    return data[at:end], end + 1
