"""Several optimizers over one model, as one.

What it guarantees: the groups are the members' own dicts, the state is the members' own, and a step
is a step of each, in their order. What it does not do: it computes nothing, and takes no further
parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zerort.errors import ConfigError

__all__ = ["Chain", "members_of", "name_of"]

_log = logging.getLogger("zerort")


class Chain(Optimizer):
    """A `torch.optim.Optimizer` made of others, `members`, which share no parameter.

    Where one learning rate is written into all groups, by a scheduler or by hand, each group takes
    it in the ratio to the first group's that it was made with.
    """

    def __init__(self, members: Sequence[Optimizer]) -> None:
        every = [inner for member in members for inner in members_of(member)]
        first = every[0].defaults
        shared = {key for key in first if all(key in other.defaults for other in every)}
        # What pickle calls gives the hooks their places without parameters of the chain's own.
        self.__setstate__(
            {
                "members": tuple(every),
                "defaults": {key: value for key, value in first.items() if key in shared},
                "_made_with": [
                    float(group.get("initial_lr", group.get("lr", 0.0)))
                    for member in every
                    for group in member.param_groups
                ],
            }
        )

    members: tuple[Optimizer, ...]
    _made_with: list[float]
    """The rate of each group."""
    _said = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: vars(self)[key] for key in ("members", "defaults", "_made_with")}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The members' groups, one behind the other."""
        return [group for member in self.members for group in member.param_groups]

    @property
    def state(self) -> MutableMapping[Any, Any]:  # type: ignore[override]
        """The members' state."""
        return _States(self.members)

    @property
    def ratios(self) -> list[float]:
        """What each group's rate was of the first's, when the chain was made."""
        rates = self._made_with
        return [rate / rates[0] if rates[0] else 1.0 for rate in rates]

    def keep_ratios(self) -> None:
        """Where the groups have one rate that were made with several, gives each its own."""
        groups, ratios = self.param_groups, self.ratios
        rates = [group.get("lr") for group in groups]
        one = rates[0]
        if isinstance(one, Tensor) or not one or any(rate != one for rate in rates):
            return
        if len(groups) != len(ratios) or all(ratio == 1.0 for ratio in ratios):
            return
        for group, ratio in zip(groups, ratios, strict=True):
            group["lr"] = one * ratio
        if not self._said:
            self._said = True
            _log.info(
                "the learning rate %g was written into all groups: each takes it in the ratio that "
                "it was made with, %s",
                one,
                ", ".join(f"{group['lr']:g}" for group in groups),
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each member that has groups; `closure` re-evaluates the loss first if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self.members:
            if member.param_groups:
                member.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of each."""
        for member in self.members:
            member.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises `ConfigError`: it would be nobody's."""
        raise ConfigError(
            "add_param_group: an optimizer made of several has no place for a further group; make "
            "all groups before zerort.initialize, each in an optimizer of its own"
        )

    def state_dict(self) -> dict[str, Any]:
        """In torch's format, parameters numbered through; what a member keeps beside that is under
        `members`.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        found: dict[str, Any] = {"state": {}, "param_groups": [], "members": []}
        at = 0
        for member in self.members:
            kept = dict(member.state_dict())
            groups, state = kept.pop("param_groups"), kept.pop("state")
            for group in groups:
                found["param_groups"].append({**group, "params": [at + p for p in group["params"]]})
            numbered = {key: value for key, value in state.items() if isinstance(key, int)}
            found["state"].update({at + key: value for key, value in numbered.items()})
            named = {key: value for key, value in state.items() if key not in numbered}
            found["members"].append({**kept, "state": named})
            at += sum(len(group["params"]) for group in groups)
        for after in self._optimizer_state_dict_post_hooks.values():
            found = after(self, found) or found
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse. Raises `ValueError` where the groups are not as many."""
        saved = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            saved = before(self, saved) or saved
        groups = list(saved["param_groups"])
        if len(groups) != len(self.param_groups):
            raise ValueError(
                f"the state is of {len(groups)} parameter groups, and there are "
                f"{len(self.param_groups)}"
            )
        beside = saved.get("members") or [{} for _ in self.members]
        at = 0
        for member, kept in zip(self.members, beside, strict=True):
            own = [groups.pop(0) for _ in member.param_groups]
            numel = sum(len(group["params"]) for group in own)
            numbered = {
                key - at: value
                for key, value in saved["state"].items()
                if isinstance(key, int) and at <= key < at + numel
            }
            moved = [{**group, "params": [p - at for p in group["params"]]} for group in own]
            state = {**kept.get("state", {}), **numbered}
            member.load_state_dict({**kept, "state": state, "param_groups": moved})
            at += numel
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


class _States(MutableMapping[Any, Any]):
    """State of all members. What is asked for the first time is its member's to make."""

    def __init__(self, members: Sequence[Optimizer]) -> None:
        self._members = members

    def _holder(self, key: Any) -> MutableMapping[Any, Any] | None:
        return next((m.state for m in self._members if key in m.state), None)

    def _owner(self, key: Any) -> MutableMapping[Any, Any]:
        for member in self._members:
            if any(key is p for group in member.param_groups for p in group["params"]):
                return member.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return (self._holder(key) or self._owner(key))[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        (self._holder(key) or self._owner(key))[key] = value

    def __delitem__(self, key: Any) -> None:
        holder = self._holder(key)
        if holder is None:
            raise KeyError(key)
        del holder[key]

    def __contains__(self, key: object) -> bool:
        return self._holder(key) is not None

    def get(self, key: Any, default: Any = None) -> Any:
        """Makes nothing."""
        holder = self._holder(key)
        return default if holder is None else holder[key]

    def __iter__(self) -> Iterator[Any]:
        for member in self._members:
            yield from member.state

    def __len__(self) -> int:
        return sum(len(member.state) for member in self._members)


def members_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """What a chain is made of; any other optimizer itself."""
    return optimizer.members if isinstance(optimizer, Chain) else (optimizer,)


def name_of(optimizer: Optimizer) -> str:
    """Of its class, or of the classes that it is made of."""
    return " + ".join(type(member).__qualname__ for member in members_of(optimizer))
