# SPDX-License-Identifier: Apache-2.0
"""Names of code that no training run stores in a checkpoint, and that files made to attack somebody do.

The reader calls nothing, whatever a file names. Refusing these protects whoever opens the file with another program.
`getattr` is for `rebuild` to judge: mmengine's logs name methods of their class by it.
"""

from __future__ import annotations

# fmt: off
_DENIED_MODULES = frozenset((
    "os", "posix", "nt", "subprocess", "_posixsubprocess", "sys", "shutil", "socket", "ctypes", "_ctypes", "importlib",
    "imp", "runpy", "pty", "code", "codeop", "commands", "webbrowser", "pickle", "_pickle", "cPickle", "marshal",
    "signal", "pdb", "bdb", "timeit", "trace", "cProfile", "profile", "pip", "http", "urllib", "ftplib", "smtplib",
    "linecache", "threading", "asyncio", "multiprocessing", "site", "sysconfig", "distutils", "setuptools",
))
_DENIED_BUILTINS = (
    "eval", "exec", "compile", "open", "setattr", "delattr", "globals", "locals", "vars", "input",
    "breakpoint", "help", "apply", "execfile", "file", "reload", "__import__", "__build_class__",
)
_DENIED_NAMES = frozenset((
    *(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in _DENIED_BUILTINS),
    "io.open", "io.FileIO", "io.open_code", "_io.open", "_io.FileIO", "_io.open_code", "codecs.open", "types.CodeType",
    "types.FunctionType", "operator.attrgetter", "operator.methodcaller", "_operator.attrgetter",
    "_operator.methodcaller", "numpy.load", "numpy.fromfile", "torch.load",
    "torch.serialization.load", "torch.hub.load", "torch.jit.load",
))
# fmt: on


def is_denied(module: str, name: str) -> bool:
    """Whether `name` of `module` is code that no training run stores."""
    return module.partition(".")[0] in _DENIED_MODULES or f"{module}.{name}" in _DENIED_NAMES
