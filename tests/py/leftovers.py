"""What a call has left behind in its process, for processes that serve several (see ranks.py).

Guaranteed: the host's random numbers begin for each call as they began for the first; what a call
changes of the settings, the environment, handlers and hooks listed here is named, and so is what it
has put in place of a function, a class, a method or a value of the modules in `WATCHED`, of
zerort's and of the tests' own.

Not looked for: what changes within an object that stays the same one (of the tests' own modules'
lists, dictionaries and sets it is), and engines that are kept to the end of the process on purpose.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules import module as modules

import logged
from zerort import log

WATCHED = {
    "builtins",
    "gc",
    "os",
    "threading",
    "time",
    "torch",
    "torch.autograd",
    "torch.autograd.graph",
    "torch.cuda",
    "torch.distributed",
    "torch.distributed.distributed_c10d",
    "torch.nn.modules.module",
    "torch.optim.optimizer",
}
"""Modules that tests patch, beside all of zerort's."""
KEPT = {
    "torch.distributed.distributed_c10d._group_count",
    "training._KEPT",  # engines that are kept on purpose
    "zerort.zero.init._nursery",  # made by the first start at stage 3
}
"""What may change."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
HERE = str(Path(__file__).parent)


class Watch:
    """Compares a process with what it was before its first call."""

    def __init__(self) -> None:
        self._random, self._seeded = random.getstate(), torch.get_rng_state()
        self._settings = dict(_settings())
        self._seen: set[str] = set()
        self._modules: dict[str, ModuleType] = {}
        self._places: list[_Place] = []

    def begin(self) -> None:
        """Before a call, when its modules are imported."""
        random.setstate(self._random)
        torch.set_rng_state(self._seeded)
        for name, module in list(sys.modules.items()):
            if name not in self._seen and _is_watched(name, module):
                self._modules[name] = module
                self._places += _places(name, module)
        self._seen = set(sys.modules)
        gc.freeze()  # what is there before the call need not be looked through after it

    def left(self) -> tuple[str, ...]:
        """What the call has changed; what it has dropped is gone when this returns."""
        gc.collect()
        logged.withdraw()
        log._default.withdraw()  # every engine's start puts it there
        found = [name for name, now in _settings() if now != self._settings[name]]
        found += [
            name for name, module in self._modules.items() if sys.modules.get(name) is not module
        ]
        for place in self._places:
            found += place.changed()
        return tuple(path for path in found if path not in KEPT)


class _Place:
    """A module, a class, or a collection of our own, and what it held."""

    def __init__(self, path: str, holder: Any) -> None:
        self._path, self._holder = path, holder
        self._before = self._now()
        self._identities = list(map(id, self._before.values()))

    def changed(self) -> list[str]:
        """The paths of what is another object now."""
        now = self._now()
        if list(map(id, now.values())) == self._identities:
            return []
        if isinstance(self._holder, ModuleType | type):  # which may have got more
            return [
                f"{self._path}.{name}"
                for name, value in self._before.items()
                if now.get(name, _GONE) is not value
            ]
        return [self._path]

    def _now(self) -> dict[Any, Any]:
        match self._holder:
            case ModuleType() | type():
                return dict(vars(self._holder))
            case dict():
                return dict(enumerate([*self._holder, *self._holder.values()]))
            case _:
                return dict(enumerate(self._holder))


_GONE = object()


def _settings() -> Iterator[tuple[str, Any]]:
    yield "the environment", dict(os.environ)
    yield "the working directory", os.getcwd()
    yield "the default dtype", torch.get_default_dtype()
    yield "the default device", torch.get_default_device()
    yield "the number of threads", torch.get_num_threads()
    yield (
        "gradients",
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    )
    yield "autocast", (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    yield "whether algorithms are deterministic", torch.get_deterministic_debug_mode()
    yield "the precision of products", torch.get_float32_matmul_precision()
    yield "anomaly detection", torch.is_anomaly_enabled()
    yield "the default group", (dist.is_initialized() and dist.group.WORLD)
    yield "signal handlers", [signal.getsignal(each) for each in SIGNALS]
    yield "hooks of the interpreter", (sys.excepthook, sys.unraisablehook, threading.excepthook)
    yield "tracing", (sys.gettrace(), sys.getprofile())
    yield "streams", (sys.stdin, sys.stdout, sys.stderr)
    yield "where imports are looked for", (list(sys.path), list(sys.meta_path))
    yield "the alias", sys.modules.get("deepspeed")
    yield "warnings", list(warnings.filters)
    yield "loggers", [_logger(each) for each in (logging.root, logging.getLogger("zerort"))]
    yield "processes", multiprocessing.active_children()
    yield "threads", {each for each in threading.enumerate() if not each.daemon}
    yield (
        "hooks of all modules",
        [
            list(hooks.values())
            for name, hooks in vars(modules).items()
            if name.startswith("_global_") and isinstance(hooks, dict)
        ],
    )


def _logger(logger: logging.Logger) -> Any:
    return logger.level, list(logger.handlers), logger.propagate, logger.disabled


def _is_watched(name: str, module: ModuleType) -> bool:
    return name in WATCHED or name.partition(".")[0] == "zerort" or _is_ours(module)


def _is_ours(module: ModuleType) -> bool:
    return str(getattr(module, "__file__", None)).startswith(HERE)


def _places(name: str, module: ModuleType) -> list[_Place]:
    """The module, its classes if they are zerort's or ours, and our collections."""
    ours = _is_ours(module)
    found = [_Place(name, module)]
    for member, value in list(vars(module).items()):
        is_collection = issubclass(type(value), dict | list | set)
        is_class = issubclass(type(value), type) and name not in WATCHED
        if (is_collection and ours) or (is_class and value.__module__ == name):
            found.append(_Place(f"{name}.{member}", value))
    return found
