"""Pickles read as data, without Python's unpickler.

A pickle is a program for a stack machine. This is that machine with nothing to run: a global is a name, never an object
of this process, and a call looks its name up in a table of constructors of plain data. Whatever is not in the table
becomes a placeholder that carries the name, and nothing is called. Names that only an attack has reason to write (a
shell, eval, an import) are refused before anything else of the file is looked at.

A few bytes can ask for much: a list copied a million times through the memo, keys whose hashes collide. So each opcode
is charged for what it makes or copies, against one sum for the file. That bounds memory and time.
"""

import pickletools
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any


class Refused(Exception):
    """The pickle asks for more than plain data; the message names what."""


class TooMuch(Exception):
    """The pickle builds more than it may."""


@dataclass(frozen=True)
class Global:
    """What a pickle calls module.name: the name alone."""

    name: str


class Buildable(ABC):
    """Data that gets its state after it was made, as numpy arrays and images do.

    refused: why it is no plain data. copied: bytes that the last build copied.
    """

    refused: str | None = None
    copied: int = 0

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
_MOST_NUMBERS = 2**18  # as keys; those below 2**61 can collide too, which costs each its way through the others
_MOST_NAME = 10_000  # characters of a text as a key, and of a global's name
_MOST_ARGUMENTS = 32
_CONTAINER = 160  # bytes of a list, dict or tuple, and of what models.finder keeps of it
_ENTRY = {"dict": 100, "set": 80, "list": 24}  # bytes, at the worst moment of growth
_OBJECT = 640  # bytes of a tensor, an array, a placeholder
_OPCODE = 8  # bytes of its place on the stack or in the memo
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

    storage turns a persistent id, torch's way to refer to a tensor's bytes, into data. most_bytes: what all that is
    made and copied may come to, whether it is kept or not.
    """

    def __init__(
        self, table: Mapping[str, Callable[..., Any] | None], storage: Callable[[Any], Any], most_bytes: int
    ) -> None:
        self._table, self._storage, self._left = table, storage, most_bytes
        self._numbers = 0

    def read(self, file: IO[bytes]) -> Any:
        """The next pickle in the file, which is left behind its end.

        Refused for names of programs and for opcodes that honest files do without. TooMuch where the bytes are spent.
        ValueError, IndexError, KeyError or TypeError for a file that is cut short or is no pickle.
        """
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            self._charge(_OPCODE)
            self._do(opcode.name, argument, number)
        return self._stack.pop()

    def _charge(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise TooMuch

    def _do(self, name: str, argument: Any, number: int) -> None:
        stack = self._stack
        if name in _LITERALS:
            self._charge(sys.getsizeof(argument))
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self._keep(argument, number)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            if argument < 0 or (value := self._memo[argument]) is _NOTHING:
                raise ValueError("nothing in this place of the memo")
            stack.append(value)
        elif name == "MEMOIZE":
            self._memo.append(stack[-1])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self._charge(_CONTAINER)
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self._charge(_CONTAINER)
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
            self._build()
        elif name in ("BINPERSID", "PERSID"):
            self._charge(_OBJECT)
            stack.append(self._storage(stack.pop() if name == "BINPERSID" else argument))
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._since_mark()
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"opcode {name}")

    def _keep(self, place: int, number: int) -> None:
        """Into the memo, a list: whoever pickles counts from 0 or 1, so no place is beyond the opcodes so far."""
        if not 0 <= place <= number:
            raise ValueError("a place of the memo that is far ahead")
        gap = place + 1 - len(self._memo)
        if gap > 0:
            self._charge(_OPCODE * gap)
            self._memo += [_NOTHING] * gap
        self._memo[place] = self._stack[-1]

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, Buildable):
            raise Refused(f"attributes for a {type(target).__name__}")
        try:
            target.build(state)
        except Refused as error:
            target.refused = str(error)
        self._charge(_OBJECT + target.copied)

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _collect(self, name: str) -> None:
        items = self._since_mark()
        self._charge(_CONTAINER + _ENTRY["dict"] * len(items) // 2)
        if name == "DICT":
            self._stack.append({})
            self._set_items(self._stack[-1], items)
        elif name == "FROZENSET":
            self._charge(_ENTRY["set"] * len(items))
            self._stack.append(frozenset(map(self._key, items)))
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
            self._charge(_ENTRY["dict"] * len(items) // 2)
            self._set_items(target, items)
        elif name.startswith("APPEND") and isinstance(target, list):
            self._charge(_ENTRY["list"] * len(items))
            target.extend(items)
        elif name == "ADDITEMS" and isinstance(target, set):
            self._charge(_ENTRY["set"] * len(items))
            target.update(map(self._key, items))
        else:
            raise Refused(f"items for a {type(target).__name__}")

    def _name(self, argument: str | None) -> None:
        if argument is None:  # STACK_GLOBAL
            name, module = self._stack.pop(), self._stack.pop()
            is_named = isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= _MOST_NAME
            full = f"{module}.{name}" if is_named else "a nameless global"
        else:
            full = argument.replace(" ", ".", 1)
        self._stack.append(self._named(full))

    def _named(self, full: str) -> Global | Placeholder:
        self._charge(_OBJECT + len(full))
        told = full[:_MOST_NAME].replace("__builtin__.", "builtins.")
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
        made = self._made(called, arguments)
        self._charge(sys.getsizeof(made) if isinstance(made, _PLAIN) else _OBJECT)
        self._stack.append(made)

    def _made(self, called: Any, arguments: Any) -> Any:
        """What the table makes of a call, or a placeholder."""
        named = called.name if isinstance(called, Global | Placeholder) else type(called).__name__
        if not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
            return Placeholder(_call_of(named))
        self._charge(sum(sys.getsizeof(value) for value in arguments if isinstance(value, _PLAIN)))
        foreign = [value.name for value in arguments if isinstance(value, Placeholder)]
        if isinstance(called, Placeholder):
            is_copy = named.startswith(("copyreg.", "copy_reg."))  # which is told the class
            return Placeholder(foreign[0] if foreign and is_copy else named)
        if foreign:
            return Placeholder(foreign[0])
        make = self._table.get(named) if isinstance(called, Global) else None
        if make is None:
            return Placeholder(_call_of(named))
        try:
            return make(*arguments)
        except Refused as error:
            return Placeholder(str(error))

    def _key(self, value: Any) -> Any:
        if isinstance(value, Placeholder):
            return f"<{value.name}>"
        if isinstance(value, int | float):
            self._numbers += 1
            if self._numbers > _MOST_NUMBERS:
                raise TooMuch
            return _checked_number(value)
        if isinstance(value, str | bytes) and len(value) > _MOST_NAME:
            raise Refused(f"a key of {len(value)} characters")
        if isinstance(value, str | bytes | None):
            return value
        if isinstance(value, tuple) and 0 < len(value) <= _MOST_ARGUMENTS and all(map(_is_part, value)):
            # hashing a deeply nested tuple would overflow C's stack, and its hash can be chosen
            text = str(tuple(_checked_number(part) if isinstance(part, int) else part for part in value))
            self._charge(sys.getsizeof(text))
            return text
        raise Refused(f"a {type(value).__name__} as a key")

    def _set_items(self, target: dict[Any, Any], items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value


_NOTHING = object()  # in the memo, where nothing was put
_PLAIN = (str, bytes, int, float, tuple, list, dict, set, frozenset)


def _checked_number(value: float) -> float:
    if isinstance(value, int) and (value.bit_length() > 61 or abs(value) >= _MOST_KEY):
        raise Refused("a number of more than 61 bits as a key")
    return value


def _is_part(value: Any) -> bool:
    return isinstance(value, int | float | None) or (isinstance(value, str) and len(value) <= _MOST_NAME)


def _call_of(named: str) -> str:
    return named if named.startswith("a call of ") else f"a call of {named}"


def shown(text: object, most: int = 80) -> str:
    """A text, bytes or a number out of a file, fit for one line of a terminal; of anything else its type.

    What is nested is not rendered: a short pickle can make a list whose text has no end.
    """
    if isinstance(text, int) and text.bit_length() > 256:
        return f"a number of {text.bit_length()} bits"
    if isinstance(text, str | bytes):
        text = text[: 4 * most]
    elif not isinstance(text, int | float | None):
        return f"a {type(text).__name__}"
    line = str(text).strip().encode("unicode_escape").decode("ascii")
    return line if len(line) <= most else line[:most] + "..."


def shown_list(values: Sequence[object]) -> str:
    """The first few of some values."""
    told = [f"'{shown(value)}'" if isinstance(value, str) else shown(value) for value in values[:4]]
    return f"[{', '.join(told)}{', ...' * (len(values) > 4)}]"
