"""Pickles read as data, without Python's unpickler.

A pickle is a program for a stack machine. This is that machine with nothing to run: a global is a name, never an object
of this process, and a call looks its name up in a table of constructors of plain data. Whatever is not in the table
becomes a placeholder that carries the name, and nothing is called. Names that only an attack has reason to write (a
shell, eval, an import) are refused before anything else of the file is looked at. Memory stays within a small multiple
of the file's size.
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
    """Data that gets its state after it was made, as numpy arrays and images do. refused: why it is no plain data."""

    refused: str | None = None

    @abstractmethod
    def build(self, state: Any) -> None:
        """Take the state that the pickle gives."""


class Attributed(dict[Any, Any], Buildable):
    """An OrderedDict; attributes that a pickle gives it (a state dict's _metadata) are dropped."""

    def build(self, state: Any) -> None:
        """Forget the attributes."""


class Placeholder(Buildable):
    """What stands for a class, a function or an object off the table: its name, and a dict that was to be its state."""

    def __init__(self, name: str) -> None:
        self.name = self.refused = name
        self.state: dict[Any, Any] = {}

    def build(self, state: Any) -> None:
        """Keep a dict, as an argparse.Namespace has it; forget anything else."""
        self.state = state if isinstance(state, dict) else {}


_PROGRAMS = frozenset({"os", "posix", "nt", "subprocess", "sys", "ctypes", "pty", "runpy", "importlib", "socket"})
_BUILTINS = frozenset({"eval", "exec", "execfile", "compile", "open", "input", "__import__", "breakpoint"})
_MOST_KEY = 2**61 - 1  # whole numbers from here on share hashes, and a file could choose them so
_MOST_ARGUMENTS = 32
_LITERALS = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleReader:
    """Reads pickles of protocols 0 to 5. table: what calls can make, and names that may stand as they are (None).

    storage turns a persistent id, torch's way to refer to a tensor's bytes, into data.
    """

    def __init__(self, table: Mapping[str, Callable[..., Any] | None], storage: Callable[[Any], Any]) -> None:
        self._table, self._storage = table, storage

    def read(self, file: IO[bytes]) -> Any:
        """The next pickle in the file, which is left behind its end.

        Refused for names of programs and for opcodes that honest files do without. ValueError, IndexError, KeyError or
        TypeError for a file that is cut short or is no pickle.
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
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"):
            self._call(name, argument)
        elif name == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Buildable):
                raise Refused(f"attributes for a {type(stack[-1]).__name__}")
            try:
                stack[-1].build(state)
            except Refused as error:
                stack[-1].refused = str(error)
        elif name in ("BINPERSID", "PERSID"):
            stack.append(self._storage(stack.pop() if name == "BINPERSID" else argument))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"opcode {name}")

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
        if isinstance(target, Placeholder):
            return  # an object's own items, a list's or a dict's
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
        self._stack.append(self._named(full))

    def _named(self, full: str) -> Global | Placeholder:
        told = full.replace("__builtin__.", "builtins.")
        parts = told.split(".")
        if not _PROGRAMS.isdisjoint(parts) or (parts[0] == "builtins" and not _BUILTINS.isdisjoint(parts)):
            raise Refused(shown(told))
        return Global(full) if full in self._table else Placeholder(shown(told))

    def _call(self, name: str, argument: str | None) -> None:
        if name in ("INST", "OBJ"):  # of protocol 0 and 1
            items = self._since_mark()
            called = self._named(str(argument).replace(" ", ".", 1)) if name == "INST" else items.pop(0)
            arguments: Any = tuple(items)
        else:
            if name == "NEWOBJ_EX":
                self._stack.pop()  # keywords, which nothing on the table takes
            arguments, called = self._stack.pop(), self._stack.pop()
            if name == "NEWOBJ_EX" and not isinstance(called, Placeholder):
                called = Placeholder(f"opcode {name}")
        self._stack.append(self._made(called, arguments))

    def _made(self, called: Any, arguments: Any) -> Any:
        """What the table makes of a call, or a placeholder."""
        named = called.name if isinstance(called, Global | Placeholder) else type(called).__name__
        if not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
            return Placeholder(f"a call of {named}")
        foreign = [value.name for value in arguments if isinstance(value, Placeholder)]
        if isinstance(called, Placeholder):
            is_copy = named.startswith(("copyreg.", "copy_reg."))  # which is told the class
            return Placeholder(foreign[0] if foreign and is_copy else named)
        if foreign:
            return Placeholder(foreign[0])
        make = self._table.get(named) if isinstance(called, Global) else None
        if make is None:
            return Placeholder(f"a call of {named}")
        try:
            return make(*arguments)
        except Refused as error:
            return Placeholder(str(error))


def shown(text: object, most: int = 80) -> str:
    """Text out of a file, fit for one line of a terminal."""
    line = str(text).strip().encode("unicode_escape").decode("ascii")
    return line if len(line) <= most else line[:most] + "..."


def _key(value: Any) -> Any:
    if isinstance(value, Placeholder):
        return f"<{value.name}>"
    if isinstance(value, int) and abs(value) >= _MOST_KEY:
        raise Refused("a number of more than 61 bits as a key")
    if isinstance(value, str | bytes | int | float | None):
        return value
    if isinstance(value, tuple) and value and all(isinstance(part, str | int | float | None) for part in value):
        return str(value)  # hashing a deeply nested tuple would overflow C's stack, and its hash can be chosen
    raise Refused(f"a {type(value).__name__} as a key")


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[_key(key)] = value
