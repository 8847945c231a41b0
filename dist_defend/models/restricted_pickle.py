"""Pickles read as data, without Python's unpickler.

A pickle is a program for a stack machine. This is that machine with nothing to run: a global is a name, never an object
of this process, and a call looks its name up in a table of constructors of plain data. Whatever is not in the table is
refused by name before anything else of the file is looked at. Memory stays within a small multiple of the file's size.
"""

import pickletools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any


class Refused(Exception):
    """The pickle asks for more than plain data; the message names what."""


@dataclass(frozen=True)
class Global:
    """What a pickle calls module.name: the name alone."""

    name: str


class Buildable(ABC):
    """Data that gets its state after it was made, as numpy arrays and images do."""

    @abstractmethod
    def build(self, state: Any) -> None:
        """Take the state that the pickle gives."""


class Attributed(dict[Any, Any], Buildable):
    """An OrderedDict; attributes that a pickle gives it (a state dict's _metadata) are dropped."""

    def build(self, state: Any) -> None:
        """Forget the attributes."""


_LITERALS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleReader:
    """Reads pickles of protocols 0 to 5. table: what calls may make, and names that may stand as they are (None).

    storage turns a persistent id, torch's way to refer to a tensor's bytes, into data.
    """

    def __init__(self, table: Mapping[str, Callable[..., Any] | None], storage: Callable[[Any], Any]) -> None:
        self._table, self._storage = table, storage

    def read(self, file: IO[bytes]) -> Any:
        """The next pickle in the file, which is left behind its end.

        Refused for globals off the table and for opcodes that plain data does without. ValueError, IndexError, KeyError
        or TypeError for a file that is cut short or is no pickle.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        for opcode, argument, _ in pickletools.genops(file):
            self._do(opcode.name, argument)
        return self._stack.pop()

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(self._memo[argument])
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            self._collect(name)
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"):
            self._extend(name)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name in ("REDUCE", "NEWOBJ"):
            self._call()
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Buildable):
                raise Refused(f"attributes for a {type(stack[-1]).__name__}")
            stack[-1].build(state)
        elif name in ("BINPERSID", "PERSID"):
            stack.append(self._storage(stack.pop() if name == "BINPERSID" else argument))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(shown(argument.replace(" ", ".", 1) if name == "INST" else f"opcode {name}"))

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _collect(self, name: str) -> None:
        items = self._since_mark()
        if name == "DICT":
            self._stack.append({})
            _set_items(self._stack[-1], items)
        elif name == "FROZENSET":
            self._stack.append(frozenset(map(_key, items)))
        else:
            self._stack.append(tuple(items) if name == "TUPLE" else items)

    def _extend(self, name: str) -> None:
        if name.endswith("S"):
            items = self._since_mark()
        else:
            count = 2 if name == "SETITEM" else 1
            items = self._stack[-count:]
            del self._stack[-count:]
        target = self._stack[-1]
        if name.startswith("SETITEM") and isinstance(target, dict):
            _set_items(target, items)
        elif name.startswith("APPEND") and isinstance(target, list):
            target.extend(items)
        elif name == "ADDITEMS" and isinstance(target, set):
            target.update(map(_key, items))
        else:
            raise Refused(f"items for a {type(target).__name__}")

    def _name(self, argument: str | None) -> None:
        if argument is None:  # STACK_GLOBAL
            name, module = self._stack.pop(), self._stack.pop()
            full = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "a nameless global"
        else:
            full = argument.replace(" ", ".", 1)
        if full not in self._table:
            raise Refused(shown(full.replace("__builtin__.", "builtins.")))
        self._stack.append(Global(full))

    def _call(self) -> None:
        arguments, called = self._stack.pop(), self._stack.pop()
        make = self._table.get(called.name) if isinstance(called, Global) else None
        if make is None or not isinstance(arguments, tuple):
            raise Refused(f"a call of {called.name if isinstance(called, Global) else type(called).__name__}")
        self._stack.append(make(*arguments))


def shown(text: object, most: int = 80) -> str:
    """Text out of a file, fit for one line of a terminal."""
    line = str(text).strip().encode("unicode_escape").decode("ascii")
    return line if len(line) <= most else line[:most] + "..."


def _key(value: Any) -> Any:
    if isinstance(value, str | bytes | int | float | None):  # hashing a deeply nested tuple would overflow C's stack
        return value
    raise Refused(f"a {type(value).__name__} as a key")


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value
