"""Named communicators over a job's ranks.

```text
job       all ranks
 shard    ranks that hold different shards of one model state
  inner   those of them that sit together, on one host
  outer   those of them that have the same place on different hosts
 replica  ranks that hold the same shard of different copies of it
 own      this rank alone
```

What it guarantees: the communicators are made once, by all ranks in one order, and shared: groups
of equal members are one communicator. `shard` and `replica` say what ranks hold, `inner` and
`outer` where they sit. `shard` counts its ranks by the shards that they hold: by place, then by
host. Other groups, of a device mesh or of tensor and pipeline parallelism, are named in `groups`
beside these.

Whether a step happens is the job's decision: all ranks step, or none does. What a sum over the job
counts twice because several ranks hold it, `counts` tells: a squared norm is taken from one of the
ranks that hold a shard, and a parameter that is replicated over a further group, as a norm's weight
is over the ranks of tensor parallelism, from one of that group's.

What it does not do: it plans no hop. Where ranks sit is found in `hosts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from zerort.device import default_place, device_for
from zerort.errors import CommError, ConfigError
from zerort.mesh.comm import Comm, Control
from zerort.mesh.control import GlooControl, meet, open_control
from zerort.mesh.gloo import GlooComm
from zerort.mesh.groups import Members, Partition
from zerort.mesh.hosts import Arrangement
from zerort.mesh.last_words import leave_before_the_end
from zerort.mesh.local import LocalComm
from zerort.mesh.nccl import NcclComm
from zerort.mesh.ordered import OrderedComm
from zerort.mesh.shared import SharedComm

__all__ = ["Mesh", "connect", "job_rank", "usual_device"]

Transport = Literal["auto", "gloo", "shared"]
"""What carries buckets between ranks on CPU: sockets, or memory that all ranks of a group share; or
what they can.
"""

RESERVED = frozenset({"job", "own", "inner", "outer"})


class Mesh:
    """`groups` maps a name to its parts, lists of the job's ranks; without it all ranks hold shards
    of one model state. `arrangement` gives shard, replica, inner and outer. `control` is the job's,
    and belongs to the mesh from now on.

    Raises `ConfigError` for groups that do not hold each rank once or do not fit together, and
    `CommError`.
    """

    def __init__(
        self,
        control: Control,
        device: torch.device,
        timeout: timedelta,
        groups: Mapping[str, Sequence[Sequence[int]]] | None = None,
        transport: Transport = "gloo",
        arrangement: Arrangement | None = None,
    ) -> None:
        self.rank, self.world, self.device = control.rank, control.world, device
        own = LocalComm(device, self.rank)
        self._comms: dict[str, Comm] = {"own": own}
        singles = tuple((rank,) for rank in range(self.world))
        made: dict[Partition, Comm] = {singles: own}
        try:
            for name, members in _members(groups or {}, arrangement, control).items():
                if members.parts not in made:
                    made[members.parts] = _open(control, members, device, timeout, transport)
                self._comms[name] = made[members.parts]
            order = self.shard.ranks if arrangement is None else arrangement.by_shard(self.rank)
            if order != self.shard.ranks:
                self._comms["shard"] = OrderedComm(self.shard, order)
        except BaseException:
            self.close()
            control.close()
            raise

    @property
    def control(self) -> Control:
        """The job's."""
        return self.job.control

    @property
    def job(self) -> Comm:
        """All ranks."""
        return self._comms["job"]

    @property
    def shard(self) -> Comm:
        """Ranks that hold different shards of one model state, in the order of the shards."""
        return self._comms["shard"]

    @property
    def replica(self) -> Comm:
        """Ranks that hold this rank's shard, each of its own copy of the model state."""
        return self._comms["replica"]

    def __getitem__(self, name: str) -> Comm:
        """The group of that name that this rank is in. Raises `ConfigError` for a name that is
        none.
        """
        try:
            return self._comms[name]
        except KeyError:
            raise ConfigError(
                f"mesh group {name!r}: there is none of this name, only {', '.join(self._comms)}"
            ) from None

    def settle(self) -> None:
        """Has the memory made that was asked of these groups, where it is shared. All ranks call
        it, with nothing under way. Raises `CommError`.
        """
        for comm in self._sharing:
            comm.settle()

    @property
    def shared_bytes(self) -> int:
        """Of this rank's in memory that it shares with ranks of its host."""
        return sum(comm.nbytes for comm in self._sharing)

    @property
    def _sharing(self) -> list[SharedComm]:
        comms = {id(comm): comm for comm in self._comms.values()}.values()
        return [comm for comm in comms if isinstance(comm, SharedComm)]

    def counts(self, *replicated: str) -> bool:
        """Whether this rank's value enters a sum over the job, for what the ranks of `replica` and
        of the groups `replicated` hold alike: it does on the first of each.
        """
        return all(self[name].rank == 0 for name in ("replica", *replicated))

    def close(self, *, waits: bool = True) -> None:
        """Gives all groups back. Where no peer is left that takes part in what is under way, there
        is nothing to wait for. A second call does nothing.
        """
        # who is lost in one group is lost in all
        waits = waits and not any(comm.failed for comm in self._comms.values())
        for comm in self._comms.values():
            comm.close(waits=waits)

    def part(self) -> None:
        """The program has ended while a thread of it goes on: peers hear now why this rank takes
        part in nothing any more.
        """
        leave_before_the_end()
        self.close(waits=False)


def connect(
    timeout: timedelta,
    device: torch.device | None = None,
    groups: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Mesh:
    """The mesh of this job: adopts torch.distributed, initialises it under torchrun, or runs alone.

    `device` is where the model lives when it already lives on an accelerator. Raises `ConfigError`
    and `CommError`.
    """
    control = meet(timeout)
    return Mesh(control, device or usual_device(), timeout, groups)


def job_rank() -> int | None:
    """This process's rank in the default process group; None where there is none."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else None


def usual_device() -> torch.device:
    """Where a model goes that is on no accelerator yet: the CPU where the job is gloo's."""
    on_host = dist.is_initialized() and dist.get_backend() == "gloo"
    return torch.device("cpu") if on_host else default_place()


def _open(
    control: Control,
    members: Members,
    device: torch.device,
    timeout: timedelta,
    transport: Transport,
) -> Comm:
    """A communicator over this rank's part; all ranks of the job make those of all parts."""
    assert isinstance(control, GlooControl), "several ranks, and no control group"
    whole = len(members.parts) == 1
    # A rank of this part may be stuck because one of another part is lost.
    known = control.groups.peers
    inner = control if whole else open_control(members, known, timeout)
    kind: type[NcclComm] | type[GlooComm] = GlooComm if device.type == "cpu" else NcclComm
    try:
        comm = kind(inner, device, timeout)
    except (RuntimeError, ValueError) as error:
        inner.close()
        raise CommError(
            f"rank {control.rank}: cannot make process groups on torch.distributed: {error}"
        ) from error
    if comm.world == 1:
        return LocalComm(device, control.rank)
    if isinstance(comm, GlooComm):
        comm.job = control
    if transport == "gloo" or not isinstance(comm, GlooComm) or not device_for(device).blocks:
        return comm
    if transport == "auto" and any(map(known.apart, members.parts)):
        return comm  # and nobody has to be told why
    return SharedComm(comm, control, timeout, required=transport == "shared")


def _members(
    groups: Mapping[str, Sequence[Sequence[int]]],
    arrangement: Arrangement | None,
    control: Control,
) -> dict[str, Members]:
    """Every group's members, checked."""
    rank, world = control.rank, control.world
    reserved = RESERVED & groups.keys()
    if reserved:
        raise ConfigError(
            f"mesh group {min(reserved)!r}: the name is reserved; give shard, replica, or a name "
            "of your own"
        )
    singles = [[each] for each in range(world)]
    everyone = [list(range(world))]
    flat = {"shard": everyone, "replica": singles, "inner": everyone, "outer": singles}
    seated = arrangement.groups() if arrangement is not None else flat
    wanted = {**seated, **groups}
    members = {name: Members.of(name, parts, rank, world) for name, parts in wanted.items()}
    for name in ("shard", "replica"):
        if len({len(part) for part in members[name].parts}) > 1:
            raise ConfigError(f"mesh group {name!r}: its parts have to be of one size")
    for shard in members["shard"].parts:
        for replica in members["replica"].parts:
            both = sorted(set(shard) & set(replica))
            if len(both) > 1:
                raise ConfigError(
                    f"mesh group 'replica': ranks {both[0]} and {both[1]} share a part of it "
                    "and one of 'shard', and cannot hold different shards and the same one"
                )
    return {"job": Members.everyone(rank, world), **members}
