"""Several optimizers over one model are one engine's: what belongs to each stays its own, and what
is asked of one is asked of all.
"""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from catching import assert_told, caught
from models import mlp
from terms import engine_over_terms
from zerort.errors import CheckpointError, ConfigError, PlanError
from zerort.optim import Chain

FAST, SLOW = 0.5, 0.125


class Normed(Optimizer):
    """Descent along a direction of length 1: it needs whole parameters."""

    def __init__(self, params: Any, lr: float = FAST) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["seen"] = parameter.grad.clone()
                    parameter.sub_(parameter.grad / parameter.grad.norm() * group["lr"])


def halves(model: nn.Module) -> list[Optimizer]:
    first, second = model[0], model[2]
    return [
        Normed(first.parameters()),
        torch.optim.AdamW(second.parameters(), lr=SLOW, weight_decay=0.5),
    ]


def engine_of(model: nn.Module, optimizers: Any = None, **changes: Any) -> Any:
    given = halves(model) if optimizers is None else optimizers
    return engine_over_terms(changes, model=model, optimizer=given, **{})


def step(engine: Any, seed: int = 0) -> None:
    torch.manual_seed(seed)
    engine.backward(engine(torch.randn(4, 8)).square().mean())
    engine.step()


def seeded() -> nn.Module:
    torch.manual_seed(7)
    return mlp()


def twin(steps: int, clip: float = 0.0) -> list[Tensor]:
    """What plain torch makes of it."""
    model = seeded()
    optimizers = halves(model)
    for at in range(steps):
        torch.manual_seed(at)
        model(torch.randn(4, 8)).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_two_optimizers_update_each_its_own(clip: float) -> None:
    model = seeded()
    engine = engine_of(model, gradient_clipping=clip)
    for at in range(3):
        step(engine, at)
    for mine, expected in zip(model.parameters(), twin(3, clip), strict=True):
        torch.testing.assert_close(mine.detach(), expected, rtol=1e-5, atol=1e-6)


def test_the_engines_optimizer_is_one_with_the_very_groups_of_both() -> None:
    model = seeded()
    first, second = halves(model)
    groups = [*first.param_groups, *second.param_groups]
    engine = engine_of(model, [first, second])
    optimizer = engine.optimizer
    assert isinstance(optimizer, Optimizer)
    assert all(mine is own for mine, own in zip(optimizer.param_groups, groups, strict=True))
    assert engine.get_lr() == [FAST, SLOW]
    optimizer.param_groups[1]["lr"] = 0.25
    assert second.param_groups[0]["lr"] == 0.25
    assert engine.optimizer_name() == "Normed + AdamW"
    step(engine)
    states = {id(value) for state in optimizer.state.values() for value in state.values()}
    own = [*first.state.values(), *second.state.values()]
    assert states == {id(value) for state in own for value in state.values()}
    assert len(optimizer.state) == len(first.state) + len(second.state)
    absent = nn.Parameter(torch.zeros(1))
    assert absent not in optimizer.state and optimizer.state.get(absent) is None


def test_hooks_of_each_and_of_both_are_called() -> None:
    model = seeded()
    optimizers = halves(model)
    heard: list[str] = []
    for optimizer in optimizers:
        name = type(optimizer).__name__
        optimizer.register_step_pre_hook(lambda *_, name=name: heard.append(f"before {name}"))
        optimizer.register_step_post_hook(lambda *_, name=name: heard.append(f"after {name}"))
    engine = engine_of(model, optimizers)
    engine.optimizer.register_step_pre_hook(lambda *_: heard.append("before"))
    engine.optimizer.register_step_post_hook(lambda *_: heard.append("after"))
    step(engine)
    each = ["before Normed", "after Normed", "before AdamW", "after AdamW"]
    assert heard == ["before", *each, "after"]


def test_its_state_can_be_taken_out_and_put_back() -> None:
    model = seeded()
    optimizers = halves(model)
    optimizers[1].state["of nobody"] = {"count": 3}
    chain = Chain(optimizers)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    chain.step()
    saved = copy.deepcopy(chain.state_dict())
    assert sorted(saved["state"]) == [0, 1, 2, 3]
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3]]
    again = Chain(halves(model))
    again.load_state_dict(saved)
    for parameter in model.parameters():
        mine, theirs = again.state[parameter], chain.state[parameter]
        assert mine.keys() == theirs.keys() and mine
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert again.members[1].state["of nobody"] == {"count": 3}
    with pytest.raises(ValueError, match="the state is of 1 parameter groups, and there are 2"):
        again.load_state_dict({**saved, "param_groups": saved["param_groups"][:1]})
    for copied in (copy.deepcopy(chain), pickle.loads(pickle.dumps(chain))):
        assert [len(group["params"]) for group in copied.param_groups] == [2, 2]
        assert copied.ratios == chain.ratios
        copied.step()
    chain.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ConfigError, match="no place for a further group"):
        chain.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_a_parameter_in_both_or_in_neither_is_named() -> None:
    model = seeded()
    both = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(model[2].parameters())]
    for given in (both, Chain(both)):
        error = caught(partial(engine_of, model, given))
        assert_told(error, PlanError, "parameter 2.", "is in two of the optimizers, SGD and Adam")
    model[2].bias.requires_grad_(False)
    neither = [torch.optim.SGD([model[0].weight, model[0].bias], lr=0.1)]
    error = caught(partial(engine_of, model, neither))
    assert_told(error, PlanError, "parameter 2.weight requires grad and is in none", "there are 1")
    model[2].weight.requires_grad_(False)
    assert engine_of(model, neither).optimizer.members == tuple(neither)


def test_what_is_no_list_of_optimizers_is_refused() -> None:
    model = seeded()
    mixed = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam]
    nothing = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    for given, word in (
        (mixed, "got type"),
        ([], "at least one optimizer"),
        (3, "got int"),
        (lambda params: None, "got NoneType"),
    ):
        assert_told(caught(partial(engine_of, model, given, **nothing)), ConfigError, word)


def test_a_callable_may_make_several() -> None:
    model = seeded()
    engine = engine_of(model, lambda params: halves(model))
    assert isinstance(engine.optimizer, Chain)


def test_the_one_that_cannot_run_at_a_stage_is_named() -> None:
    model = seeded()
    lbfgs = [torch.optim.LBFGS(model[0].parameters()), torch.optim.SGD(model[2].parameters())]
    error = caught(partial(engine_of, model, lbfgs))
    assert_told(error, ConfigError, "optimizer LBFGS is refused at every stage")


# ---- schedules


def one_rate(optimizer: Any) -> Any:
    class Same:
        """A schedule of a user's own, which writes one rate into all groups."""

        def __init__(self) -> None:
            self.count = 0

        def step(self) -> None:
            self.count += 1
            for group in optimizer.param_groups:
                group["lr"] = FAST / self.count

    return Same()


SCHEDULES: dict[str, tuple[Any, list[float]]] = {
    "WarmupLR": (
        {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": FAST, "warmup_num_steps": 2, "warmup_type": "linear"},
        },
        [0.0, FAST / 2, FAST, FAST],
    ),
    "OneCycleLR": (
        {
            "type": "OneCycleLR",
            "params": {
                "max_lr": FAST,
                "total_steps": 4,
                "pct_start": 0.5,
                "anneal_strategy": "linear",
                "cycle_momentum": False,
                "div_factor": 2,
            },
        },
        [FAST],
    ),
    "a user's own": (one_rate, [FAST, FAST / 2, FAST / 3]),
    "LambdaLR": (
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda at: 1 / (1 + at)),
        [FAST / 2, FAST / 3, FAST / 4],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_keeps_the_ratio_of_the_two_rates(name: str) -> None:
    schedule, expected = SCHEDULES[name]
    model = seeded()
    arguments = {"lr_scheduler": schedule} if callable(schedule) else {}
    changes = {} if callable(schedule) else {"scheduler": schedule}
    engine = engine_over_terms(changes, model=model, optimizer=halves(model), **arguments)
    seen = []
    for at in range(len(expected)):
        step(engine, at)
        seen.append(engine.get_lr())
    assert [rates[0] for rates in seen] == pytest.approx(expected)
    for first, second in seen:
        assert second == pytest.approx(first * SLOW / FAST)


def test_one_rate_written_by_hand_keeps_the_ratio_and_two_stand(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = seeded()
    engine = engine_of(model)
    groups = engine.optimizer.param_groups
    with caplog.at_level("INFO", "zerort"):
        for rate in (0.25, 0.0, 1.0):
            for group in groups:
                group["lr"] = rate
            step(engine)
            assert engine.get_lr() == [rate, rate * SLOW / FAST]
    said = [record.message for record in caplog.records if "in the ratio" in record.message]
    assert len(said) == 1 and "0.25, 0.0625" in said[0]
    groups[0]["lr"], groups[1]["lr"] = 0.1, 0.2
    step(engine)
    assert engine.get_lr() == [0.1, 0.2]


def test_only_groups_with_betas_have_them_cycled() -> None:
    model = seeded()
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5}
    engine = engine_of(model, scheduler={"type": "OneCycle", "params": cycle})
    step(engine)
    first, second = engine.optimizer.param_groups
    assert "betas" not in first and second["betas"] != (0.9, 0.999)


# ---- checkpoints


def test_state_of_one_is_not_taken_for_the_others(tmp_path: Path) -> None:
    engine = engine_of(seeded())
    step(engine)
    engine.save_checkpoint(str(tmp_path))
    model = seeded()
    same = engine_of(model)
    same.load_checkpoint(str(tmp_path))
    for mine, own in zip(model.parameters(), engine.module.parameters(), strict=True):
        assert torch.equal(mine, own)
    assert sorted(map(sorted, same.optimizer.state.values())) == sorted(
        map(sorted, engine.optimizer.state.values())
    )
    model = seeded()
    turned = engine_of(
        model,
        [Normed([*model[2].parameters(), model[0].bias]), torch.optim.AdamW([model[0].weight])],
    )
    error = caught(partial(turned.load_checkpoint, str(tmp_path)))
    words = "2.bias is updated by Normed, and by AdamW in the checkpoint"
    assert_told(error, CheckpointError, words)
    turned.load_checkpoint(str(tmp_path), load_optimizer_states=False)
