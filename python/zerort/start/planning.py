"""The plan of a model: which parameters it has, in which units, with how many buckets in flight.

It asks a module for shapes and dtypes alone, so that it is the same on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from zerort import _core
from zerort.config import Config
from zerort.errors import ConfigError
from zerort.memory import PlannedParameter, Present, exchanged
from zerort.mesh import Mesh
from zerort.start.caps import Cap
from zerort.start.grains import Grains
from zerort.start.units import in_units

__all__ = ["Planner", "Sizes", "plan_of"]

_SHARDED_WINDOW = 4


def plan_of(
    settings: Config,
    model: nn.Module,
    planned: Sequence[PlannedParameter],
    *,
    sizes: Sizes,
    window: int | None,
    grains_of: Callable[[Sequence[PlannedParameter]], Grains],
) -> tuple[Planner, _core.Plan]:
    """What is `planned` of `model`, which has been cast, in its units, and the plan for ranks of
    these `sizes`; `window` is what their communicator has in flight, and `grains_of` says what of
    the parameters may not be cut.

    Raises `PlanError` naming the parameter that cannot be planned.
    """
    cap = Cap.of(settings, [member.spec() for member in planned], sizes.world)
    members, units = in_units(settings, model, planned, cap)
    grains, costs = grains_of(members)
    planner = Planner(members, units, grains, costs, sizes, window)
    return planner, planner.plan(settings)


@dataclass(frozen=True)
class Sizes:
    """How many ranks there are, and how they share: copies of the model state, and hosts of each
    copy.
    """

    world: int
    hosts: int = 1
    replicas: int = 1

    @classmethod
    def of(cls, mesh: Mesh) -> Sizes:
        """A mesh's. Hosts of one rank, and one host, are none."""
        nested = mesh["inner"].world > 1 and mesh["outer"].world > 1
        return cls(mesh.world, mesh["outer"].world if nested else 1, mesh.replica.world)


@dataclass(frozen=True)
class Planner:
    """A model, as far as its plans depend on it."""

    members: Sequence[PlannedParameter]
    units: Sequence[int | None] | None
    grains: Sequence[_core._Grain] | None
    costs: Sequence[int] | None
    sizes: Sizes
    window: int | None
    """What the ranks' communicator has in flight."""

    def cap(self, settings: Config) -> Cap:
        """How long its buckets may become by `settings`."""
        return Cap.of(settings, [member.spec() for member in self.members], self.sizes.world)

    def plan(self, settings: Config, wire: int | None = None) -> _core.Plan:
        """Its plan by `settings`; gradients are sent in the members' own formats, or all in that
        of the number `wire`.
        """
        specs, cap = [member.spec() for member in self.members], self.cap(settings)
        return _core.Plan(
            [(n, dtype, g, own if wire is None else wire) for n, dtype, g, own in specs],
            world=self.sizes.world,
            stage=settings.zero_optimization.stage,
            cap_bytes=cap.nbytes,
            cap_elements=cap.elements,
            window=_window(settings, self.window),
            units=self.units,
            grains=self.grains,
            costs=self.costs,
            whole_padding=settings.zerort.whole_padding,
            hosts=self.sizes.hosts,
            replicas=self.sizes.replicas,
        )

    def settled(self) -> Planner:
        """The same once buckets have been filled: parameters have their values themselves, and what
        they were born in is given back.
        """
        members = [replace(member, origin=Present(member.tensor)) for member in self.members]
        return replace(self, members=members)

    def other_plan(self, settings: Config, wire: int | None = None) -> _core.Plan:
        """Its plan by `settings`, for an engine that runs already. Raises `ConfigError` where ranks
        would exchange parameters, which is arranged when an engine starts.
        """
        plan = self.plan(settings, wire)
        if exchanged(plan):
            raise ConfigError(
                "these buckets would hold parameters that ranks exchange, which a running engine "
                "does not begin: give larger buckets, or more zerort.whole_padding, or start with "
                "them"
            )
        return plan


def _window(settings: Config, usual: int | None) -> int | None:
    """Buckets in flight. All of them at once would hold a model whole that is sharded."""
    window = settings.zerort.window
    if window is None:
        return _SHARDED_WINDOW if settings.zero_optimization.shards_parameters else usual
    return None if window == "all" else window
