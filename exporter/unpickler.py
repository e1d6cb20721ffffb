# SPDX-License-Identifier: Apache-2.0
"""Reading pickles without running them.

A pickle is a program for a stack machine; Python's own machine imports what the program names and calls it. This one
imports nothing and calls nothing but the few constructors it is handed: every other object becomes an `Inert`, a record
of its name and arguments. Python's `Unpickler` with an own `find_class` would not do: it still sets attributes on
whatever stands on its stack, allocates a memo as large as an index in the file says, and overflows the C stack when a
deeply nested tuple becomes a dictionary key.
"""

from __future__ import annotations

import pickle
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from mmap import mmap
from typing import Protocol, cast

from internimage_deploy.errors import quoted
from internimage_deploy.exporter.denied import is_denied
from internimage_deploy.exporter.pickle_literals import EMPTY, LINES, NUMBERS, SIZED, Damaged

_MAX_OPCODES = 4_000_000  # 9,000 tensors take 500,000, a log of a million numbers as many; these take a gigabyte
_MAX_NAME = 500  # characters of a module and a name in it
_MAX_ARGUMENTS = 32  # of a constructor, which may copy them
_MAX_KEY_TEXT = 1000  # characters of a key; comparing long ones again and again takes as long as copying them
_MAX_KEY_BITS = 64
_MAX_NUMBER_KEYS = 10_000  # of one container; an optimiser's state has one for each parameter


class Refused(Exception):
    """The file asks for code that no training run stores; the message is its name."""


class Global:
    """The name of a class or function, which was not imported."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Inert:
    """What stands in for an object of a class that is not rebuilt: its name, and what it would have been made of."""

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name: str, arguments: tuple[object, ...] = ()) -> None:
        self.name = name
        self.arguments = arguments
        self.items: list[object] = []  # elements, or (key, value) pairs, of a list or dictionary of an unknown class
        self.state: object = None


class Buildable(Protocol):
    """An object that a constructor began and that its state completes."""

    def build(self, state: object) -> None:
        """Take the state that the pickle holds. Raises `Damaged`."""

    def finished(self) -> object:
        """The object itself, once it is complete; raises nothing."""


Constructor = Callable[..., object]


class Unpickler:
    """Reads one pickle; see the module.

    Attributes:
        position: behind the pickle, once `load` has returned.
        unknown: number of occurrences of each name that no constructor stands for.
    """

    def __init__(
        self,
        data: bytes | mmap,
        start: int = 0,
        end: int | None = None,
        *,
        constructors: Mapping[str, Constructor],
        known: frozenset[str] = frozenset(),
        persistent: Callable[[object], object] | None = None,
    ) -> None:
        """Prepare to read.

        Args:
            data: holds the pickle.
            start: its first byte.
            end: behind the last byte that it may use; None for all.
            constructors: what may be called, by the name that the pickle uses.
            known: further names that are values in themselves, and not worth a note.
            persistent: makes an object of a persistent id; raises `Damaged` if it cannot.
        """
        self._data = data
        self.position = start
        self._end = len(data) if end is None else end
        self._constructors = constructors
        self._known = known
        self._persistent = persistent
        self.unknown: Counter[str] = Counter()
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}

    def load(self) -> object:
        """The object in the pickle.

        Raises:
            Damaged: it is no pickle, ends early, or uses what a checkpoint never needs.
            Refused: it names code that no training run stores.
        """
        handlers, stop = _HANDLERS, pickle.STOP[0]
        try:
            for _ in range(_MAX_OPCODES):
                code = self._bytes(1)[0]
                if code == stop:
                    return finished(self._stack.pop())
                handler = handlers.get(code)
                if handler is None:
                    raise Damaged("it is no pickle, or a damaged one")
                handler(self)
        except (LookupError, ValueError, TypeError, OverflowError, ArithmeticError, struct.error) as error:
            raise Damaged("its pickle is damaged") from error
        raise Damaged(f"its pickle has more than {_MAX_OPCODES:,} steps")

    # The stack

    def push(self, value: object) -> None:
        """Put `value` on the stack."""
        self._stack.append(value)

    def _pop(self) -> object:
        return self._stack.pop()

    def _items(self) -> list[object]:
        """The objects above the topmost mark, which goes with them."""
        items, self._stack = self._stack, self._marks.pop()
        return [finished(item) for item in items]

    # The text

    def _bytes(self, count: int) -> bytes:
        start, end = self.position, self.position + count
        if count < 0 or end > self._end:
            raise Damaged("it ends early")
        self.position = end
        return self._data[start:end]

    def _number(self, form: str) -> int | float:
        number: int | float = struct.unpack(form, self._bytes(struct.calcsize(form)))[0]
        return number

    def _length(self, form: str) -> int:
        return int(self._number(form))

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self.position, self._end)
        if end < 0:
            raise Damaged("it ends early")
        return self._bytes(end + 1 - self.position)[:-1]

    # Opcodes

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _get(self, index: int) -> None:
        self.push(self._memo[index])

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise Damaged("its pickle is damaged")
        items = tuple(finished(item) for item in self._stack[-count:])
        del self._stack[-count:]
        self.push(items)

    def _append(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Inert):
            target.items.extend(items)
        else:
            raise Damaged("its pickle appends to what is no list")

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, dict):
            for key, value in pairs:
                target[checked_key(key, len(target))] = value
        elif isinstance(target, Inert):
            target.items.extend(pairs)
        else:
            raise Damaged("its pickle sets items of what is no dictionary")

    def _add_items(self) -> None:
        items, target = self._items(), self._stack[-1]
        if isinstance(target, set):
            target.update(checked_keys(items, len(target)))
        elif isinstance(target, Inert):
            target.items.extend(items)
        else:
            raise Damaged("its pickle adds to what is no set")

    def _find(self, module: object, name: object) -> None:
        if not (isinstance(module, str) and isinstance(name, str)) or len(module) + len(name) > _MAX_NAME:
            raise Damaged("its pickle is damaged")
        full = f"{module}.{name}"
        if is_denied(module, name):
            raise Refused(quoted(full))
        if full not in self._constructors and full not in self._known:
            self.unknown[quoted(full)] += 1
        self.push(Global(full))

    def _call(self, function: object, arguments: object) -> None:
        if not isinstance(arguments, tuple):
            raise Damaged("its pickle is damaged")
        if not isinstance(function, Global | Inert):
            raise Damaged(f"its pickle calls what is no function ({type(function).__name__})")
        constructor = self._constructors.get(function.name) if isinstance(function, Global) else None
        if constructor is not None and len(arguments) > _MAX_ARGUMENTS:
            raise Damaged("its pickle is damaged")
        self.push(Inert(function.name, arguments) if constructor is None else constructor(*arguments))

    def _reduce(self) -> None:
        arguments = self._pop()
        self._call(self._pop(), arguments)

    def _new_with_keywords(self) -> None:
        keywords, arguments, kind = self._pop(), self._pop(), self._pop()
        name = kind.name if isinstance(kind, Global | Inert) else type(kind).__name__
        self.push(Inert(name, (arguments, keywords)))

    def _object(self) -> None:
        kind, *arguments = self._items()
        self._call(kind, tuple(arguments))

    def _instance(self) -> None:
        module, name = (self._line().decode() for _ in range(2))
        arguments = tuple(self._items())
        self._find(module, name)
        self._call(self._pop(), arguments)

    def _build(self) -> None:
        state, target = finished(self._pop()), self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
        elif hasattr(target, "build"):
            cast(Buildable, target).build(state)
        # Else it is a dictionary or tensor with attributes of its own, such as a state dict's `_metadata`.

    def _persistent_id(self) -> None:
        identifier = self._pop()
        if self._persistent is None:
            raise Damaged("its pickle refers to objects outside it")
        self.push(self._persistent(identifier))


def finished(value: object) -> object:
    """The object that a `Buildable` stands for; anything else as it is."""
    return cast(Buildable, value).finished() if hasattr(value, "finished") else value


_PLAIN_KEYS = (type(None), Global, Inert)


def checked_key(key: object, held: int) -> object:
    """`key` itself if a container that holds `held` keys finds its place quickly; a stand-in for any other.

    Numbers, and tuples of them, can be chosen so that all of their hashes lead to one place of a dictionary, where
    each insertion passes every earlier one; and a tuple is hashed anew each time.
    """
    if isinstance(key, int | float):
        fits = held < _MAX_NUMBER_KEYS and (isinstance(key, float) or key.bit_length() <= _MAX_KEY_BITS)
    else:
        fits = len(key) <= _MAX_KEY_TEXT if isinstance(key, str | bytes) else isinstance(key, _PLAIN_KEYS)
    return key if fits else Inert(type(key).__name__)


def checked_keys(keys: Iterable[object], held: int = 0) -> Iterator[object]:
    """`checked_key` of each of `keys`, for a container that holds `held` others."""
    return map(checked_key, keys, count(held))


_Handler = Callable[[Unpickler], object]


def _sized(form: str, make: Callable[[bytes], object]) -> _Handler:
    return lambda machine: machine.push(make(machine._bytes(machine._length(form))))


def _of_line(make: Callable[[bytes], object]) -> _Handler:
    return lambda machine: machine.push(make(machine._line()))


def _of_number(form: str) -> _Handler:
    return lambda machine: machine.push(machine._number(form))


def _of_nothing(make: Callable[[], object]) -> _Handler:
    return lambda machine: machine.push(make())


def _dictionary(machine: Unpickler) -> None:
    items = machine._items()
    machine.push({})
    machine._set_items(items)


def _stack_global(machine: Unpickler) -> None:
    name = machine._pop()
    machine._find(machine._pop(), name)


def _set_item(machine: Unpickler) -> None:
    value, key = finished(machine._pop()), machine._pop()
    machine._set_items([key, value])


_HANDLERS: dict[int, _Handler] = {
    code[0]: handler
    for code, handler in (
        {code: _sized(*how) for code, how in SIZED.items()}
        | {code: _of_line(make) for code, make in LINES.items()}
        | {code: _of_number(form) for code, form in NUMBERS.items()}
        | {code: _of_nothing(make) for code, make in EMPTY.items()}
        | {
            pickle.PROTO: lambda m: m._bytes(1),
            pickle.FRAME: lambda m: m._bytes(8),
            pickle.MARK: Unpickler._mark,
            pickle.POP: lambda m: m._pop() if m._stack else m._items(),
            pickle.POP_MARK: Unpickler._items,
            pickle.DUP: lambda m: m.push(m._stack[-1]),
            pickle.PUT: lambda m: m._put(int(m._line()[:20])),
            pickle.BINPUT: lambda m: m._put(m._length("<B")),
            pickle.LONG_BINPUT: lambda m: m._put(m._length("<I")),
            pickle.MEMOIZE: lambda m: m._put(len(m._memo)),
            pickle.GET: lambda m: m._get(int(m._line()[:20])),
            pickle.BINGET: lambda m: m._get(m._length("<B")),
            pickle.LONG_BINGET: lambda m: m._get(m._length("<I")),
            pickle.TUPLE: lambda m: m.push(tuple(m._items())),
            pickle.TUPLE1: lambda m: m._tuple(1),
            pickle.TUPLE2: lambda m: m._tuple(2),
            pickle.TUPLE3: lambda m: m._tuple(3),
            pickle.LIST: lambda m: m.push(m._items()),
            pickle.DICT: _dictionary,
            pickle.FROZENSET: lambda m: m.push(frozenset(checked_keys(m._items()))),
            pickle.APPEND: lambda m: m._append([finished(m._pop())]),
            pickle.APPENDS: lambda m: m._append(m._items()),
            pickle.SETITEM: _set_item,
            pickle.SETITEMS: lambda m: m._set_items(m._items()),
            pickle.ADDITEMS: Unpickler._add_items,
            pickle.GLOBAL: lambda m: m._find(m._line().decode(), m._line().decode()),
            pickle.STACK_GLOBAL: _stack_global,
            pickle.REDUCE: Unpickler._reduce,
            pickle.NEWOBJ: Unpickler._reduce,
            pickle.NEWOBJ_EX: Unpickler._new_with_keywords,
            pickle.OBJ: Unpickler._object,
            pickle.INST: Unpickler._instance,
            pickle.BUILD: Unpickler._build,
            pickle.BINPERSID: Unpickler._persistent_id,
        }
    ).items()
}
