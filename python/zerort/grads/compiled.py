"""Compiled autograd: a backward that torch captures when it runs, and compiles in pieces.

torch traces the Python hooks that it finds on the way, unless they are under
`torch.compiler.disable`: then the graph ends there, the hook runs as it is, and the next piece
begins. An engine's hooks are such breaks, so a bucket leaves between two pieces, and a module that
is compiled whole, whose gradients would else all come at the end, overlaps again. Each hook costs a
piece: one a bucket, or one a parameter where every parameter has a hook (a trace, an accelerator).

This is the one importer of what torch keeps private of it. What it does not do: a `backward()` of
the user's own inside a context of the user's own is refused, because torch (as of 2.15) calls no
callback at the end of such a backward, so nothing would tell the engine that it is over.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch

from zerort.errors import ConfigError, StepError

__all__ = ["Around", "around", "plain", "refuse_foreign", "shield"]

Around = Callable[[], AbstractContextManager[None]]
"""What the one call of `backward` runs in."""

Hook = Callable[..., None]

_PRIVATE = "torch._dynamo.compiled_autograd"
_SOUND = (2, 15)
"""From here on torch runs an engine's hooks in a compiled backward; earlier ones are tried."""


def around(options: Mapping[str, Any]) -> Around:
    """A context for backwards, compiled with torch.compile's `options`; `fullgraph` does not hold,
    for every hook ends a graph.

    Raises `ConfigError` where this torch has no such context, or one that an engine's hooks break.
    """
    try:
        enable = importlib.import_module(_PRIVATE)._enable
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            "compile(compiled_autograd_enabled=True) is refused: torch "
            f"{torch.__version__} has no {_PRIVATE}._enable ({error}); leave it out, or install "
            "another torch"
        ) from error
    try:
        release = tuple(int(part) for part in torch.__version__.split(".")[:2])
        if release < _SOUND:  # elsewhere it would only fill the compiler's caches
            _try(enable)
    except Exception as error:
        raise ConfigError(
            f"compile(compiled_autograd_enabled=True) is refused: torch {torch.__version__} cannot "
            f"run the hook of a module's outputs in a compiled backward ({type(error).__name__}: "
            f"{error}); leave it out, or install another torch"
        ) from error
    _pass_over_calls_of_hooks()
    compiler = torch.compile(**{**options, "fullgraph": False})
    return lambda: enable(compiler)


def _try(enable: Callable[..., AbstractContextManager[None]]) -> None:
    """Runs a small backward as an engine does. torch 2.6 knows no graph task in the hook of several
    tensors.
    """
    output = torch.ones(1, requires_grad=True) * 2
    hook = shield(lambda _: None)
    torch.autograd.graph.register_multi_grad_hook([output], hook, mode="any")
    with torch.enable_grad(), enable(torch.compile(backend="eager")):
        output.backward()  # type: ignore[no-untyped-call]


def _pass_over_calls_of_hooks() -> None:
    """torch's own frame around a hook is compiled anew for each kind of gradient, and the hook ends
    its graph: of nine kinds the ninth hits the compiler's limit. So that frame is run as it is.
    """
    with suppress(ImportError, AttributeError):  # another torch, which warns then
        frames = importlib.import_module("torch._dynamo.eval_frame")
        around_hooks = importlib.import_module("torch._dynamo.external_utils").call_hook
        frames.skip_code(around_hooks.__code__)


def shield(hook: Hook) -> Hook:
    """The hook, at which the graph of a backward ends."""
    wrapped: Hook = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return wrapped


def plain(hook: Hook) -> Hook:
    """The hook as it is, where nothing is compiled: shielding costs a call of Python's."""
    return hook


def is_on() -> bool:
    """Whether backwards are captured here now, or one that is runs. Imports nothing."""
    private = sys.modules.get(_PRIVATE)
    return private is not None and (
        private.compiled_autograd_enabled or private.in_compiled_autograd_region
    )


def refuse_foreign() -> None:
    """Raises `StepError` where a context of the user's own captures backwards."""
    if is_on():
        raise StepError(
            "a backward inside a compiled-autograd context that is not this engine's: nothing "
            "would tell that it is over. Call engine.compile(compiled_autograd_enabled=True) once, "
            "and engine.backward(loss) outside of contexts of your own; a backward through the "
            "modules of two engines cannot be compiled"
        )
