"""What of a model is at home on the host: asked of the configuration, and said at the start."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch.optim import Optimizer

from zerort import _core
from zerort.config import Config
from zerort.device import device_for
from zerort.errors import ConfigError
from zerort.memory import FlatModel, Homes, HostRoom
from zerort.optim import name_of

__all__ = ["Traffic", "homes_for", "log_homes"]

_log = logging.getLogger("zerort")


def homes_for(
    config: Config, plan: _core.Plan, device: torch.device, optimizer: Optimizer | None
) -> Homes:
    """Where the buckets of `plan` are at home; on the device, where that is the host itself.

    Raises `ConfigError` for an optimizer that steps on an accelerator only.
    """
    state, shards = config.offloads
    here = device_for(device)
    host = here.host(pinned=state.pin_memory) if state.on_host else None
    shards_host = here.host(pinned=shards.pin_memory) if shards.on_host else None
    if host is None or optimizer is None:
        return Homes(shards_host=shards_host)
    if any(group.get("capturable") for group in optimizer.param_groups):
        raise ConfigError(
            f"zero_optimization.offload_optimizer: {name_of(optimizer)} was made with "
            "capturable=True and steps on an accelerator only; leave one of the two out"
        )
    chosen = Homes.chosen(plan.buckets, state.ratio)
    return Homes(HostRoom(host), chosen, shards_host)


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank, on the host and between it and the device."""

    kept: int
    """Masters and sums on the host; an optimizer's state comes to it."""
    sums: int
    """To the host in each reduced backward, and as many to the device before one that adds."""
    values_there: int
    """Updated parameters to the device, in each step."""
    values_here: int
    """Updated shards to the host, in each step."""
    shards: int
    """To the device, each time that all units are gathered."""

    @classmethod
    def of(cls, flat: FlatModel) -> Traffic:
        """Of all buckets."""
        away = [bucket for bucket in flat.trained if bucket.is_on_host]
        here = [bucket for bucket in flat.trained if not bucket.is_on_host]
        return cls(
            sum(bucket.master.nbytes + bucket.accum.tensor.nbytes for bucket in away)
            + sum(room.master.nbytes for room in flat.rooms.values() if room.is_on_host),
            sum(bucket.accum.tensor.nbytes for bucket in away),
            sum(bucket.owned.tensor.nbytes for bucket in away if not bucket.shard_on_host),
            sum(bucket.owned.tensor.nbytes for bucket in here if bucket.shard_on_host),
            sum(bucket.owned.tensor.nbytes for bucket in flat.buckets if bucket.shard_on_host),
        )


def log_homes(flat: FlatModel) -> None:
    """What is at home on the host, and how much a step copies."""
    traffic = Traffic.of(flat)
    if traffic.kept:
        on_host = sum(bucket.is_on_host for bucket in flat.trained)
        _log.info(
            "offload_optimizer: %d of %d buckets step on the host; a rank keeps %d bytes of "
            "masters and sums there, copies %d bytes of sums to it in a reduced backward, and %d "
            "bytes of parameters to the device in a step",
            on_host,
            len(flat.trained),
            traffic.kept,
            traffic.sums,
            traffic.values_there,
        )
    if traffic.shards:
        _log.info(
            "offload_param: a rank keeps %d bytes of shards on the host, and copies them to the "
            "device whenever all units are gathered",
            traffic.shards,
        )
