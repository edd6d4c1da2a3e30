"""Optimizers as users write them: what each can be given is found by its behaviour, and finding it
out changes nothing of it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import ranks
from blocks import BlockState
from catching import assert_told, caught
from models import WIDTH
from terms import engine_over_terms
from training import keep
from zerort.errors import ConfigError
from zerort.optim import Abilities, Lion, examine

RATE = 0.125
START = 2.0


class Plain(Optimizer):
    """Gradient descent; the others differ from it in one way."""

    def __init__(self, params: Iterable[Any], lr: Any = RATE) -> None:
        super().__init__(params, {"lr": lr})

    def tensors(self) -> list[tuple[nn.Parameter, Any]]:
        return [(p, g["lr"]) for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter, lr in self.tensors():
            if parameter.grad is not None:
                self.update(parameter, lr)

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        parameter.sub_(parameter.grad * lr)


class Attributed(Plain):
    """Numbers, lists and a lock on itself."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.factor, self.steps, self.lock = 1.0, 0, threading.Lock()
        self.history: list[int] = []
        self.counts = {"steps": torch.zeros(())}

    def step(self, closure: Any = None) -> Any:
        with self.lock:
            self.steps += 1
            self.history.append(self.steps)
            self.counts["steps"] += 1
        super().step(closure)

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        super().update(parameter, lr * self.factor)


class Capturing(Plain):
    """Holds its groups, and the list in one, as LBFGS does."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.mine = self.param_groups
        self.held = self.param_groups[0]["params"]

    def tensors(self) -> list[tuple[nn.Parameter, Any]]:
        return [(parameter, self.mine[0]["lr"]) for parameter in self.held]


class Wrapping(Optimizer):
    """Another optimizer inside, whose groups and state are its own."""

    def __init__(self, params: Iterable[Any]) -> None:
        self.inner = Attributed(params)
        self.defaults = self.inner.defaults

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class StateFirst(Plain):
    """State of each parameter is made in the constructor, a number and a tensor each."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        for parameter, _ in self.tensors():
            self.state[parameter] = {"count": 0, "rate": torch.full_like(parameter, 1.0)}

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        state = self.state[parameter]
        state["count"] += 1
        super().update(parameter, lr * state["rate"])


class SharedState(Plain):
    """State that belongs to no parameter, as MADGRAD's."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.state["k"] = torch.zeros(1)

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        self.state["k"] += 1
        super().update(parameter, lr)


class Closed(Plain):
    """Its closure has a default; without one it says so by an assertion where `needs` is set."""

    needs = False

    def step(self, closure: Callable[[], Tensor] | None = lambda: torch.zeros(())) -> Any:
        assert closure is not None
        super().step()
        return closure()


class NeedsClosure(Plain):
    """The signature does not tell."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        if closure is None:
            raise ValueError("this optimizer needs a closure")


class NeedsGradients(Plain):
    """Written for models in which everything trains: it fails on nothing."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            params = [parameter.data for parameter in group["params"]]
            gradients = [parameter.grad * 1 for parameter in group["params"]]
            torch._foreach_mul_(gradients, group["lr"])
            torch._foreach_sub_(params, gradients)


class Whole(Plain):
    """Looks at whole parameters."""

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        parameter.sub_(parameter.grad / parameter.grad.norm() * lr)


class OnlyMatrices(Plain):
    """Takes no flat tensor."""

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        if parameter.dim() != 2:
            raise ValueError(f"matrices only, got {parameter.dim()} dimensions")
        super().update(parameter, lr)


class SecondGroupWhole(Plain):
    """Each group is treated in a way of its own."""

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        second = any(parameter is other for other in self.param_groups[-1]["params"])
        gradient = parameter.grad / parameter.grad.norm() if second else parameter.grad
        parameter.sub_(gradient * lr)


class SecondGroupOfMatrices(Plain):
    """One class for both kinds, as Muon with its AdamW is often written."""

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        second = any(parameter is other for other in self.param_groups[-1]["params"])
        gradient = torch.linalg.qr(parameter.grad)[0] if second else parameter.grad
        parameter.sub_(gradient * lr)


class ClipsTogether(Plain):
    """Elementwise but for a factor: halves of a tensor have the norm of the whole."""

    def norm(self, group: int) -> Tensor:
        return torch.stack([p.grad.norm() for p, _ in self.tensors()]).norm()

    def factor(self, norm: Tensor) -> Tensor:
        return torch.clamp(1000.0 / norm, max=1.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        factors = [self.factor(self.norm(at)) for at in range(len(self.param_groups))]
        for group, factor in zip(self.param_groups, factors, strict=True):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * factor * group["lr"])

    def tensors(self) -> list[tuple[nn.Parameter, Any]]:
        return [(p, lr) for p, lr in super().tensors() if p.grad is not None]


class ClipsGroup(ClipsTogether):
    """Each group by its own norm."""

    def norm(self, group: int) -> Tensor:
        members = self.param_groups[group]["params"]
        return torch.stack([p.grad.norm() for p in members] or [torch.zeros(())]).norm()


class SkipsTiny(ClipsTogether):
    """A direction of a length that all have together: with tiny gradients."""

    def factor(self, norm: Tensor) -> Tensor:
        return 1.0 / norm if norm < 1e-6 else torch.ones(())


class TrustsModel(ClipsTogether):
    """As LAMB, over all parameters at once."""

    def factor(self, norm: Tensor) -> Tensor:
        weights = torch.stack([p.norm() for p, _ in self.tensors()]).norm()
        return weights / norm


class TrustsWhole(TrustsModel):
    """And by parameter too."""

    def factor(self, norm: Tensor) -> Tensor:
        return super().factor(norm) / max(p.numel() for p, _ in self.tensors())


class KeepsParameters(Plain):
    """Goes on with the parameters it was made from."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.kept = list(self.param_groups[0]["params"])

    def tensors(self) -> list[tuple[nn.Parameter, Any]]:
        return [(parameter, RATE) for parameter in self.kept]


class KeepsMoments(Plain):
    """By parameter, but not in its state."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        self.moments = {parameter: torch.zeros_like(parameter) for parameter, _ in self.tensors()}

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        parameter.sub_(self.moments[parameter].add_(parameter.grad) * lr)


class Idle(Plain):
    def step(self, closure: Any = None) -> Any:
        pass


class Unscaled(torch.optim.AdamW):
    """A step of its own over torch's constructor, which says what torch's step can do."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * group["lr"])


ELEMENTWISE: dict[str, Callable[[Any], Optimizer]] = {
    "plain": Plain,
    "attributes": Attributed,
    "captured groups": Capturing,
    "wrapped": Wrapping,
    "state in the constructor": StateFirst,
    "state of no parameter": SharedState,
    "closure with a default": Closed,
    "only where there are gradients": NeedsGradients,
    "rate in a tensor": lambda params: Plain(params, torch.tensor(RATE)),
    "rate of zero at first": lambda params: Plain(params, 0.0),
    "own step over fused": lambda params: Unscaled(params, lr=RATE, fused=True),
    "foreach": lambda params: type("Mine", (torch.optim.SGD,), {})(params, lr=RATE, foreach=True),
}
WHOLE: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "norm": (Whole, "it looks at whole tensors"),
    "state in blocks": (BlockState, "it looks at whole tensors"),
    "state in blocks of all": (partial(BlockState, least=0), "it looks at whole tensors"),
    "matrices": (OnlyMatrices, "ValueError: matrices only, got 1 dimensions"),
}
NEVER: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "closure": (NeedsClosure, "needs a closure. A closure repeats forward and backward"),
    "LBFGS": (torch.optim.LBFGS, "closure"),
    "SparseAdam": (lambda p: torch.optim.SparseAdam(list(p)), "does not support dense gradients"),
    "kept parameters": (KeepsParameters, "changes parameters that are not in its param_groups"),
    "kept moments": (KeepsMoments, "KeyError"),
}


def of_matrices() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))


def test_a_known_class_is_not_tried() -> None:
    for kind in (torch.optim.AdamW, torch.optim.SGD, Lion):
        assert examine(kind([nn.Parameter(torch.ones(2))], lr=0.1)) == Abilities()


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_one_that_treats_each_element_alone_may_have_shards(name: str) -> None:
    found = examine(ELEMENTWISE[name](of_matrices().parameters()))
    assert found == Abilities(gaps=name != "only where there are gradients")


ACROSS: dict[str, tuple[Callable[[Any], Optimizer], str]] = {
    "idle": (Idle, "move nothing"),
    "limit on the norm of all": (ClipsTogether, "it looks across parameters"),
    "limit on a group's norm": (ClipsGroup, "gradients of about 1e+06"),
    "trust ratio of the model": (TrustsModel, "it looks across parameters"),
    "trust ratio of all, of whole parameters": (TrustsWhole, "it looks across parameters"),
    "floor under the norm of all": (SkipsTiny, "gradients of about 1e-10"),
}


def over_two_groups(make: Callable[[Any], Optimizer]) -> Optimizer:
    parts = list(of_matrices().parameters())
    return make([{"params": parts[:2]}, {"params": parts[2:]}])


@pytest.mark.parametrize("name", WHOLE)
def test_one_that_looks_at_whole_parameters_may_have_those(name: str) -> None:
    make, reason = WHOLE[name]
    found = examine(over_two_groups(make))
    assert found.never is None and found.across is None and found.gaps
    assert found.whole.keys() == {0, 1} and all(reason in why for why in found.whole.values())


@pytest.mark.parametrize("takes", [SecondGroupWhole, SecondGroupOfMatrices])
def test_each_group_is_looked_at_by_itself(takes: Callable[[Any], Optimizer]) -> None:
    found = examine(over_two_groups(takes))
    assert found.whole.keys() == {1} and found.across is None


@pytest.mark.parametrize("name", ACROSS)
def test_one_that_looks_across_parameters_is_found_and_refused_where_ranks_have_parts(
    name: str,
) -> None:
    make, reason = ACROSS[name]
    found = examine(over_two_groups(make))
    assert found.never is None and found.across is not None and reason in found.across
    for stage in (1, 2, 3):
        start = partial(engine_over_terms, {"zero_optimization": {"stage": stage}})
        error = caught(partial(start, model=of_matrices(), optimizer=over_two_groups_of(make)))
        assert_told(error, ConfigError, "cannot run on shards", "Use zero_optimization.stage 0")
    engine_over_terms({"zero_optimization": {"stage": 0}}, model=of_matrices(), optimizer=make)


def over_two_groups_of(make: Callable[[Any], Optimizer]) -> Callable[[Any], Optimizer]:
    def over(params: Iterable[Any]) -> Optimizer:
        parts = list(params)
        return make([{"params": parts[:2]}, {"params": parts[2:]}])

    return over


@pytest.mark.parametrize("name", NEVER)
def test_one_that_no_stage_can_run_is_refused_at_stage_0_too(name: str) -> None:
    make, reason = NEVER[name]
    found = examine(make(of_matrices().parameters()))
    assert found.never is not None and reason in found.never
    model = of_matrices()
    for stage in (0, 2):
        start = partial(engine_over_terms, {"zero_optimization": {"stage": stage}}, model=model)
        error = caught(partial(start, optimizer=make))
        assert_told(error, ConfigError, "is refused at every stage", reason)


# ---- the optimizer itself


def facts(optimizer: Optimizer) -> dict[str, Any]:
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    own = {
        key: copy.deepcopy(value)
        for key, value in vars(optimizer).items()
        if key not in ("lock", "mine", "held", "inner", "kept", "moments", "state", "param_groups")
    }
    return {"groups": copy.deepcopy(groups), "own": own}


@pytest.mark.parametrize("name", [*ELEMENTWISE, *WHOLE])
def test_the_probe_changes_nothing_of_the_optimizer(name: str) -> None:
    make = ELEMENTWISE[name] if name in ELEMENTWISE else WHOLE[name][0]
    model = of_matrices()
    params = list(model.parameters())
    optimizer = make(params)
    counted = optimizer.inner if isinstance(optimizer, Wrapping) else optimizer
    before, values = facts(counted), [parameter.detach().clone() for parameter in params]
    state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
    hooked = []
    if not isinstance(optimizer, Wrapping):
        optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    examine(optimizer)
    assert torch.equal(torch.rand(4), expected)
    assert str(facts(counted)["own"].get("history")) == str(before["own"].get("history"))
    assert str(facts(counted)["own"].get("counts")) == str(before["own"].get("counts"))
    assert facts(counted)["own"].get("steps") == before["own"].get("steps")
    assert str(facts(counted)["groups"]) == str(before["groups"])
    assert all(map(torch.equal, params, values))
    assert all(
        mine is theirs
        for mine, theirs in zip(optimizer.param_groups[0]["params"], params, strict=True)
    )
    assert str(state) == str(dict(optimizer.state))
    assert not hooked


@pytest.mark.parametrize("kind", [Plain, Wrapping])
def test_a_scheduler_made_before_hears_of_no_step(kind: Callable[[Any], Any]) -> None:
    optimizer = kind(of_matrices().parameters())
    scheduled = getattr(optimizer, "inner", optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(scheduled, gamma=0.5)
    assert examine(optimizer) == Abilities()
    assert not getattr(scheduled, "_opt_called", False)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()


# ---- training


class Weights(nn.Module):
    """A loss that is linear in two vectors, of which the first may be frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((WIDTH,), START))
        self.b = nn.Parameter(torch.full((WIDTH, 2), START))

    def forward(self) -> Tensor:
        return 1.0 * self.a.sum() + 2.0 * self.b.sum()


def train_each(rank: int, world: int, stage: int, clip: float) -> dict[str, list[float]]:
    found = {}
    for name, make in ELEMENTWISE.items():
        model = Weights()
        groups = [{"params": [model.a]}, {"params": [model.b]}]
        single = name == "captured groups"
        engine = engine_over_terms(
            {
                "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6},
                "gradient_clipping": clip,
            },
            model=model,
            optimizer=make(model.parameters() if single else groups),
        )
        for step in range(3):
            model.a.requires_grad_(step != 1)
            engine.backward(engine())
            engine.step()
        assert model.a.min() == model.a.max() and model.b.min() == model.b.max()
        found[name] = [model.a[0].item(), model.b[0, 0].item()]
        keep(engine)
    return found


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("stage", [0, 2])
def test_users_optimizers_train_like_plain_descent(stage: int, clip: float) -> None:
    for found in ranks.shared(2, train_each, stage, clip):
        expected = found.pop("plain")
        if not clip:
            assert expected == [START - 2 * RATE * 1.0, START - 3 * RATE * 2.0]
        assert found.pop("rate of zero at first") == [START, START]
        for name, values in found.items():
            assert values == pytest.approx(expected, rel=1e-6), name


def train_whole(rank: int, world: int) -> list[float]:
    engine = engine_over_terms(
        {"zero_optimization": {"stage": 0}}, model=Weights(), optimizer=Whole
    )
    engine.backward(engine())
    engine.step()
    return [engine.module.a[0].item(), engine.module.b[0, 0].item()]


def test_one_of_whole_parameters_trains_at_stage_0() -> None:
    step = [RATE / WIDTH**0.5, RATE / (2 * WIDTH) ** 0.5]
    for found in ranks.shared(2, train_whole):
        assert found == pytest.approx([START - step[0], START - step[1]])


# ---- state that the constructor makes


class Differing(Plain):
    """Each parameter begins with a number of its own."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params)
        for number, (parameter, _) in enumerate(self.tensors(), 1):
            self.state[parameter] = {
                "factor": torch.full_like(parameter, float(number)),
                "low": torch.zeros_like(parameter, dtype=torch.int8),
                "number": number,
            }

    def update(self, parameter: nn.Parameter, lr: Any) -> None:
        state = self.state[parameter]
        assert state["factor"].dtype == parameter.dtype and state["low"].dtype == torch.int8
        assert state["factor"].shape == state["low"].shape == parameter.shape
        assert bool((state["factor"] == state["number"]).all())
        super().update(parameter, lr * state["factor"])


class WithGain(Weights):
    """Some elements stand alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((), START))

    def forward(self) -> Tensor:
        return super().forward() + self.gain


def begin_with_state(rank: int, world: int) -> None:
    for changes in ({}, {"bf16": {"enabled": True}}):
        for stage in (0, 2):
            model = WithGain()
            engine = engine_over_terms(
                {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6}, **changes},
                model=model,
                optimizer=Differing(model.parameters()),
            )
            for _ in range(2):
                engine.backward(engine())
                engine.step()
            assert model.a.tolist() == [START - 2 * RATE] * WIDTH
            assert model.b[:, 0].tolist() == [START - 2 * RATE * 2 * 2] * WIDTH
            assert model.gain.item() == START - 2 * RATE * 3
            keep(engine)


def test_each_parameter_begins_with_its_own_state() -> None:
    ranks.shared(2, begin_with_state)


def adagrad_over_a_scalar(rank: int, world: int) -> None:
    for stage in (0, 2):
        model = WithGain()
        model.a, model.b = model.b, model.a
        optimizer = torch.optim.Adagrad([model.gain, model.a, model.b], lr=RATE)
        engine = engine_over_terms(
            {"zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6}},
            model=model,
            optimizer=optimizer,
        )
        engine.backward(engine())
        engine.step()
        assert model.gain.item() == pytest.approx(START - RATE)
        keep(engine)


def test_a_scalar_first_in_the_group_is_no_model_for_the_others() -> None:
    ranks.shared(2, adagrad_over_a_scalar)
