"""The parameters that are sharded and belong to no engine, and what is done with them while their
model is built.

Within `zero.Init` a constructor may do anything with them: what it reads is gathered, what it
writes is run on all ranks alike, and each keeps its part. An operation that needs no other
element's value, as `normal_` and `mul_` do not, costs no communication. Afterwards values are there
in `GatheredParameters` alone, until `initialize` takes them. So it is with a model whose engine has
gone: each rank has the shards that the engine had.

What this guarantees: before every collective the ranks have compared what they are at, so that
ranks which build different models, or one that has raised, are found and named, and none waits.
What it does not do: it knows no modules.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zerort.errors import CommError, PlanError, StepError
from zerort.memory import HeldBucket, digest, unintercepted
from zerort.mesh import Mesh, connect
from zerort.params import sharded
from zerort.zero import legacy
from zerort.zero.born import Born, Serial
from zerort.zero.cuts import AsInBucket, Even
from zerort.zero.legacy import Legacy

__all__ = ["Nursery", "Parted"]

_NEEDS_NO_OTHERS = frozenset(
    """
    .data add_ addcdiv_ addcmul_ bernoulli_ cauchy_ clamp_ clamp_max_ clamp_min_ constant_ copy_
    div_ erfinv_ exp_ exponential_ fill_ geometric_ kaiming_uniform_ log_ log_normal_ mul_ neg_
    normal_ pow_ random_ rsub_ sqrt_ sub_ tanh_ uniform_ zero_ __iadd__ __imul__ __isub__
    __itruediv__
    """.split()  # noqa: SIM905
)
"""In-place operations whose result in each element follows from that element, and from arguments
that are no sharded parameters.
"""


class Parted(PlanError):
    """Ranks are at different places while they build a model. All raise it together."""


class Nursery:
    """Of this process. `timeout` is how long a rank waits for its peers."""

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self._mesh: Mesh | None = None
        self.building = 0
        """How many `Init`s are open."""
        self._born: dict[int, Born] = {}
        self._endings: dict[int, weakref.finalize[Any, Any]] = {}
        self._lent: list[Born] = []
        self._serial = 0
        self._writes, self._last_write = 0, "nothing"
        """A sum over what was written without asking the others, and the last of it."""

    @property
    def mesh(self) -> Mesh:
        """The ranks, since `connect`."""
        assert self._mesh is not None, "the ranks are not connected"
        return self._mesh

    def connect(self) -> None:
        """All ranks call it, before they ask one another anything; a second call does nothing."""
        if self._mesh is None:
            self._mesh = connect(self.timeout)

    # Births.

    def bear(
        self, parameter: nn.Parameter, name: str, dtype: torch.dtype, *, source: int | None
    ) -> None:
        """From now on this rank has its part of the parameter, which is cast to `dtype` when the
        model is complete. With `source` that rank's values count; else all ranks have made the
        same.
        """
        if source is not None:
            self._level(parameter, name, source)
        born = Born(parameter, self._evenly(parameter), self._number(), dtype)
        born.take(self.mesh.device)
        self._enter(born, name)

    def bear_from(
        self, parameter: nn.Parameter, name: str, read: Callable[[int, int], Tensor]
    ) -> None:
        """A parameter on the meta device gets its values from `read(lo, hi)`, which gives elements
        lo..hi (hi - lo,) in the order of its indices.
        """
        born = Born(parameter, self._evenly(parameter), self._number(), parameter.dtype)
        born.make(self.mesh.device, read)
        self._enter(born, name)

    @unintercepted
    def differing(self, kind: str, named: Mapping[str, nn.Parameter]) -> set[str]:
        """Which of the parameters that a constructor has made have other values on some rank. All
        ranks call it, behind each constructor: most make the same, and then it is one small
        all-reduce.
        """
        own = {name: digest(parameter) for name, parameter in named.items()}
        shapes = [(name, tuple(parameter.shape)) for name, parameter in named.items()]
        every = zlib.crc32(repr(own).encode())
        if self.meet(f"has made a {kind} with {_shaped(shapes)}", digest=every):
            return set()
        found = self.mesh.job.control.gather_objects(own)
        return {name for name in own if any(other[name] != own[name] for other in found)}

    def _level(self, parameter: nn.Parameter, name: str, source: int) -> None:
        """Brings rank `source`'s values to all ranks."""
        self.meet(f"takes {name}, of shape {tuple(parameter.shape)}")
        with torch.no_grad():
            values = parameter.detach().to(self.mesh.device, copy=True)
            values = values.contiguous()
            self.mesh.job.broadcast(values.view(-1), source)
            parameter.data.copy_(values)

    def cast(self) -> None:
        """Models are complete: every parameter is in its dtype from now on."""
        for born in list(self._born.values()):
            if born.is_alive and self.born(born.parameter) is born:
                born.cast(born.dtype)

    def _evenly(self, parameter: nn.Parameter) -> Even:
        return Even(self.mesh.job, parameter.numel())

    def _number(self) -> Serial:
        self._serial += 1
        return "", self._serial

    def inherit(self, bucket: HeldBucket, left: Legacy) -> None:
        """A bucket's engine has gone, and its sharded parameters' values stay in its shards."""
        shard, spec = bucket.part_with_shard(), bucket.spec
        for index, parameter in enumerate(bucket.params):
            cut = AsInBucket(left, spec.offsets[index], spec.numels[index], spec.shard_numel)
            born = Born(parameter, cut, (left.engine, spec.params[index]), shard.dtype)
            start = spec.offsets[index] + cut.own[0] - left.rank * spec.shard_numel
            lo, hi = cut.own
            born.inherit(shard.narrow(0, start if lo < hi else 0, hi - lo))
            self._enter(born, bucket.names[index])

    def _enter(self, born: Born, name: str) -> None:
        parameter = born.parameter
        self._born[id(parameter)] = born
        sharded.enter(parameter, self, name)
        sharded.conceal(parameter)
        ending = weakref.finalize(parameter, self._forget, id(parameter), born.serial)
        ending.atexit = False
        self._endings[id(parameter)] = ending

    def _forget(self, key: int, serial: Serial) -> None:
        """The parameter is no more."""
        born = self._born.get(key)
        if born is not None and born.serial == serial:
            del self._born[key], self._endings[key]
            sharded.forget(key)

    def born(self, parameter: Tensor) -> Born | None:
        """What is held of a parameter, where it is one of these."""
        born = self._born.get(id(parameter))
        return born if sharded.keeper_of(parameter) is self else None

    def part(self) -> bool:
        """Parts with those that engines have; returns whether any are left."""
        for key, born in list(self._born.items()):
            if not born.is_alive or self.born(born.parameter) is not born:
                self._endings.pop(key).detach()
                del self._born[key]
        return bool(self._born)

    def meet_heirs(self, held: Iterable[Born]) -> None:
        """All ranks, before what engines have left comes together, for the same parameters. Raises
        `PlanError` on all where it cannot.
        """
        found = {id(born.legacy): born.legacy for born in held if born.legacy is not None}
        legacy.meet(sorted(found.values(), key=lambda one: one.engine), self.mesh.job)

    # `sharded.Keeper`.

    def use(self, params: Sequence[nn.Parameter], call: Callable[[], Any]) -> Any:
        """While a model is built: gathers, and lends what an alias of is given out."""
        held = self._held(params, "are read")
        self.meet(f"reads {_listed(held)}")
        with self._whole(held), torch.no_grad():
            out = call()
            for born in held:
                born.lent = born.lent or _shares_memory(out, born)
        self._lent += [born for born in held if born.lent and born not in self._lent]
        return out

    def write(self, access: sharded.Writing, call: Callable[[], Any]) -> Any:
        """While a model is built: on all ranks alike."""
        held = self._held(access.params, f"are written by {access.what}")
        written = [self._born[id(parameter)] for parameter in access.written]
        alone = access.what in _NEEDS_NO_OTHERS and len(held) == len(written)
        if alone:
            self._last_write = f"{_listed(held)} by {access.what}"
            self._writes = zlib.crc32(self._last_write.encode(), self._writes)
        else:
            self.meet(f"writes {_listed(held)}")
        with self._whole(held, gathers=not alone), torch.no_grad():
            try:
                return call()
            finally:
                for born in written:
                    born.keep()

    def detached(self, parameter: nn.Parameter) -> Tensor | None:
        """A tensor without values, unless the model is being built."""
        return None if self.building else sharded.meta_like(parameter)

    def copied(self, parameter: nn.Parameter) -> nn.Parameter:
        """Born like its model, with the same values."""
        self.settle(ends=False)
        born, name = self._born[id(parameter)], sharded.name_of(parameter)
        with torch._C.DisableTorchFunctionSubclass():
            empty = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=parameter.dtype, device=born.device
            )
            kind = sharded.kind_of(parameter)
            twin = torch.Tensor._make_subclass(kind, empty, parameter.requires_grad)
            twin.__dict__.update(parameter.__dict__)
        self._enter(born.copy(twin, self._number()), name)
        return twin

    @contextmanager
    def hold(self, params: Sequence[nn.Parameter], modifier: int | None) -> Iterator[None]:
        """Within, `params` are whole; see `GatheredParameters`."""
        held = self._in_order(params)
        self.settle(ends=False)
        self.connect()
        numbers = [born.serial for born in held]
        self.meet(f"enters GatheredParameters of {_listed(held)}", (modifier, numbers))
        self.meet_heirs(held)
        with self._whole(held):
            before = [born.version for born in held]
            try:
                yield
            finally:
                now = [born.version for born in held]
                written = self._take(
                    held, modifier, [a != b for a, b in zip(before, now, strict=True)]
                )
        if written is not None:
            raise StepError(
                f"parameter {sharded.name_of(written)} was written inside GatheredParameters "
                "without a modifier_rank, and the change is lost: say whose values count, with "
                "GatheredParameters(parameters, modifier_rank=0)"
            )

    def _take(
        self, held: Sequence[Born], modifier: int | None, changed: Sequence[bool]
    ) -> nn.Parameter | None:
        """Behind a body: what was written counts, or is named."""
        if modifier is not None:
            for born in held:
                born.spread(modifier)
                born.keep()
            return None
        written = list(compress(held, changed))
        if not self.building:
            return written[0].parameter if written else None
        for born in written:
            born.keep()
        return None

    @contextmanager
    def _whole(self, held: Sequence[Born], *, gathers: bool = True) -> Iterator[None]:
        """Within, they are themselves, with their values if it `gathers`."""
        done: list[Born] = []
        try:
            for born in held:
                born.gather(values=gathers)
                done.append(born)
                sharded.expose(born.parameter)
            yield
        finally:
            for born in done:
                born.release()
                if not born.is_held:
                    sharded.conceal(born.parameter)

    def _held(self, params: Sequence[nn.Parameter], what: str) -> list[Born]:
        if not self.building:
            raise StepError(
                f"parameter {sharded.name_of(params[0])} is sharded and in no engine, and its "
                f"values {what}: do it inside zerort.zero.GatheredParameters(parameters, "
                "modifier_rank=0), which all ranks enter together, or give the model to "
                "zerort.initialize first"
            )
        self.settle(ends=False)
        return self._in_order(params)

    def _in_order(self, params: Sequence[nn.Parameter]) -> list[Born]:
        """As they were born: callers may have had them in a set."""
        held = {id(p): self._born[id(p)] for p in params}
        return sorted(held.values(), key=lambda born: born.serial)

    # Between uses.

    def settle(self, *, ends: bool) -> None:
        """Takes what has been written through aliases; building goes on unless it `ends`."""
        lent = [born for born in self._lent if born.is_alive and self.born(born.parameter) is born]
        for born in lent:
            born.settle(ends=ends)
        self._lent = [born for born in lent if born.lent]

    def meet(
        self, place: str, detail: Any = None, failure: str | None = None, digest: int = 0
    ) -> bool:
        """Before a collective: raises `Parted` where the ranks are not all at the same place, or
        one has failed or written what another has not. Returns whether all have one `digest`.
        """
        job = self.mesh.job
        rows = torch.zeros(job.world, 4, dtype=torch.int64)
        mark = zlib.crc32(repr((place, detail)).encode())
        rows[job.rank] = torch.tensor([mark, failure is not None, self._writes, digest])
        job.control.all_reduce(rows)
        same = (rows == rows[0]).all(0)
        if rows[:, 1].any() or not same[0]:
            self._part(
                "ranks do not build the same model, or do not use it alike before "
                "zerort.initialize",
                failure or place,
            )
        if not same[2]:
            self._part(
                "ranks do not write the parameters of modules that are made alike: write them on "
                "all ranks, or inside zerort.zero.GatheredParameters(parameters, modifier_rank=0)",
                f"wrote {self._last_write} last",
            )
        return bool(same[3])

    def _part(self, headline: str, own: str) -> None:
        told = self.mesh.job.control.gather_objects(own)
        listed = "; ".join(f"rank {rank} {one}" for rank, one in enumerate(told))
        raise Parted(f"{headline}: {listed}")

    def finish(self, error: BaseException | None) -> None:
        """Building is over on this rank, with an `error` or without: the others raise with its
        reason where they meet next. All ranks call it, but for one whose error all have.
        """
        try:
            self.settle(ends=True)
            if error is None:
                self.cast()
                self.meet("has its model")
            elif not isinstance(error, CommError | Parted):
                with suppress(CommError, Parted):
                    failure = f"raised {type(error).__name__}: {error}"
                    self.meet("", failure=failure)
        finally:
            self._writes, self._last_write = 0, "nothing"

    def close(self) -> None:
        """Gives the process groups back."""
        if self._mesh is not None:
            self._mesh.close()


def _shaped(named: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in named)


def _listed(held: Sequence[Born]) -> str:
    """Names, which may be many modules', with numbers, which are not."""
    named = [f"{sharded.name_of(born.parameter)} (number {born.serial[1]})" for born in held[:4]]
    more = f" and {len(held) - 4} more" if len(held) > 4 else ""
    return f"{', '.join(named)}{more}"


def _shares_memory(out: Any, born: Born) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        storage = born.parameter.untyped_storage()._cdata
        return any(
            leaf.layout is torch.strided and leaf.untyped_storage()._cdata == storage
            for leaf in tree_leaves(out)
            if isinstance(leaf, Tensor)
        )
