"""What the engine counts, when it steps, and the calls that steer accumulation.

Every scenario runs on one rank without a group and on two; its name says what must hold. The
weights are minus the summed gradients (see `Terms`).
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ranks
from models import Terms
from terms import Weights, at_each_stage, engine_over_terms, step_with, weights
from training import at_stage
from zerort.errors import ConfigError, StepError

NAN = float("nan")


def counters(engine: Any) -> tuple[int, int, int, int]:
    """(micro_steps, global_steps, global_samples, skipped_steps)."""
    return engine.micro_steps, engine.global_steps, engine.global_samples, engine.skipped_steps


def a_step_is_counted_at_the_boundary_only(rank: int, world: int) -> None:
    engine = engine_over_terms({"train_micro_batch_size_per_gpu": 2}, accumulation=3)
    seen = []
    for _ in range(6):
        step_with(engine, 1.0, 1.0)
        seen.append(counters(engine)[:3])
    samples = 6 * world
    assert seen == [
        (1, 0, 0),
        (2, 0, 0),
        (3, 1, samples),
        (4, 1, samples),
        (5, 1, samples),
        (6, 2, 2 * samples),
    ]


def weights_move_at_the_boundary_only(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    assert step_with(engine, 2.0, 4.0) == (0.0, 0.0)
    assert step_with(engine, 4.0, 8.0) == (-3.0, -6.0)


def was_step_applied_speaks_of_the_last_step(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    seen = [engine.was_step_applied()]
    for _ in range(4):
        step_with(engine, 1.0, 1.0)
        seen.append(engine.was_step_applied())
    assert seen == [False, False, True, False, True]


def the_boundary_is_every_last_micro_batch(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=3)
    seen = []
    for _ in range(6):
        seen.append(engine.is_gradient_accumulation_boundary())
        step_with(engine, 1.0, 1.0)
    assert seen == [False, False, True] * 2


def an_overridden_boundary_sticks(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    engine.set_gradient_accumulation_boundary(False)
    for _ in range(3):
        assert step_with(engine, 2.0, 2.0) == (0.0, 0.0)
    engine.set_gradient_accumulation_boundary(True)
    assert engine.is_gradient_accumulation_boundary()
    assert step_with(engine, 2.0, 2.0) == (-4.0, -4.0)  # four halves
    assert step_with(engine, 2.0, 2.0) == (-5.0, -5.0)
    assert counters(engine)[:2] == (5, 2)


def no_sync_accumulates_until_a_backward_outside(rank: int, world: int) -> None:
    engine = engine_over_terms()
    with engine.no_sync():
        engine.backward(engine(1.0, 10.0))
        engine.backward(engine(2.0, 20.0))
    assert step_with(engine, 4.0, 40.0) == (-7.0, -70.0)
    assert step_with(engine, 1.0, 1.0) == (-8.0, -71.0)


def a_step_inside_no_sync_is_an_error(rank: int, world: int) -> None:
    engine = engine_over_terms()
    with engine.no_sync():
        engine.backward(engine(1.0, 10.0))
        with pytest.raises(StepError, match="no_sync"):
            engine.step()
    assert step_with(engine, 4.0, 40.0) == (-5.0, -50.0)


def zero_grad_drops_a_micro_batch(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    step_with(engine, 64.0, 64.0)
    engine.zero_grad()
    assert step_with(engine, 2.0, 4.0) == (-1.0, -2.0)


def zero_grad_drops_what_no_sync_kept(rank: int, world: int) -> None:
    engine = engine_over_terms()
    with engine.no_sync():
        engine.backward(engine(64.0, 64.0))
    engine.zero_grad(set_to_none=False)
    assert step_with(engine, 2.0, 4.0) == (-2.0, -4.0)


def the_norm_is_that_of_the_mean_before_clipping(rank: int, world: int) -> None:
    engine = engine_over_terms({"gradient_clipping": 1.0})
    assert engine.get_global_grad_norm() is None
    a, b = step_with(engine, 3.0, 4.0)
    assert engine.get_global_grad_norm() == pytest.approx(10.0)  # four threes and four fours
    assert (a, b) == pytest.approx((-0.3, -0.4), rel=1e-6)


def the_scheduler_steps_at_boundaries(rank: int, world: int) -> None:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    engine = engine_over_terms(
        accumulation=2, model=model, optimizer=optimizer, lr_scheduler=scheduler
    )
    seen = []
    for _ in range(4):
        step_with(engine, 1.0, 1.0)
        seen.append(engine.get_lr())
    assert seen == [[1.0], [0.5], [0.5], [0.25]]
    assert weights(engine) == (-1.5, -1.5)


class _Noted(torch.optim.lr_scheduler.ConstantLR):
    """Remembers what its `step` was called with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.notes: list[Any] = []
        super().__init__(optimizer)

    def step(self, note: Any = None) -> None:
        self.notes.append(note)
        super().step()


def lr_kwargs_reach_the_scheduler(rank: int, world: int) -> None:
    engine = engine_over_terms(lr_scheduler=_Noted)
    engine.backward(engine(1.0, 1.0))
    engine.step(lr_kwargs={"note": "validation loss"})
    assert engine.lr_scheduler.notes[-1] == "validation loss"


def a_skipped_step_counts_but_moves_nothing(rank: int, world: int) -> None:
    model = Terms()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    engine = engine_over_terms(model=model, optimizer=optimizer, lr_scheduler=scheduler)
    step_with(engine, 1.0, 1.0)
    assert step_with(engine, NAN if rank == 0 else 1.0, 1.0) == (-1.0, -1.0)
    assert counters(engine) == (2, 2, 2 * world, 1)
    assert not engine.was_step_applied()
    assert engine.get_lr() == [0.5]
    assert step_with(engine, 1.0, 1.0) == (-1.75, -1.75)  # momentum 0.5 * 1 + 1, at a rate of 0.5


def batch_sizes_follow_the_configuration(rank: int, world: int) -> None:
    engine = engine_over_terms({"train_micro_batch_size_per_gpu": 2}, accumulation=3)
    sizes = (
        engine.train_batch_size(),
        engine.train_micro_batch_size_per_gpu(),
        engine.gradient_accumulation_steps(),
    )
    assert sizes == (6 * world, 2, 3)


def a_new_train_batch_size_changes_the_accumulation(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    for _ in range(4):
        step_with(engine, 1.0, 1.0)
    engine.set_train_batch_size(4 * world)
    assert engine.gradient_accumulation_steps() == 4
    seen = [step_with(engine, 4.0, 4.0) for _ in range(4)]
    assert seen == [(-2.0, -2.0)] * 3 + [(-6.0, -6.0)]


def a_new_train_batch_size_begins_a_window_of_its_own(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=3)
    for _ in range(3):
        step_with(engine, 0.0, 0.0)
    engine.set_train_batch_size(
        2 * world
    )  # three is no multiple of two: counted from the beginning it would end at once
    seen = [step_with(engine, 2.0, 4.0) for _ in range(4)]
    assert seen == [(0.0, 0.0), (-2.0, -4.0), (-2.0, -4.0), (-4.0, -8.0)]
    assert counters(engine)[:2] == (7, 3)


def a_new_micro_batch_size_keeps_the_accumulation(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    engine.set_train_micro_batch_size(8)
    assert (engine.gradient_accumulation_steps(), engine.train_batch_size()) == (2, 16 * world)


def backward_returns_the_loss_divided_by_the_accumulation(rank: int, world: int) -> None:
    model = Terms()
    torch.nn.init.ones_(model.a)
    engine = engine_over_terms(accumulation=4, model=model)
    returned = engine.backward(engine(a=2.0))
    assert returned.item() == 2.0
    engine.step()
    assert engine.backward(engine(a=2.0), scale_wrt_gas=False).item() == 8.0


def train_and_eval_return_the_engine(rank: int, world: int) -> None:
    engine = engine_over_terms()
    assert engine.eval() is engine and not engine.module.training
    assert engine.train() is engine and engine.module.training


def momenta_and_rates_are_listed_by_group(rank: int, world: int) -> None:
    model = Terms()
    groups = [{"params": [model.a], "lr": 0.25}, {"params": [model.b], "momentum": 0.5}]
    engine = engine_over_terms(model=model, optimizer=torch.optim.SGD(groups, lr=1.0))
    assert engine.get_lr() == [0.25, 1.0]
    assert engine.get_mom() == [0.0, 0.5]
    other = engine_over_terms({"optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.9]}}})
    assert [tuple(betas) for betas in other.get_mom()] == [(0.8, 0.9)]
    assert step_with(engine, 4.0, 4.0) == (-1.0, -4.0)


def a_rate_changed_by_hand_is_used(rank: int, world: int) -> None:
    engine = engine_over_terms()
    step_with(engine, 1.0, 1.0)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.25
    assert step_with(engine, 4.0, 8.0) == (-2.0, -3.0)


def overflow_speaks_of_the_last_boundary(rank: int, world: int) -> None:
    engine = engine_over_terms(accumulation=2)
    seen = [engine.overflow]
    for coefficient in (NAN if rank == world - 1 else 1.0, 1.0, 1.0, 1.0):
        step_with(engine, coefficient, 1.0)
        seen.append(engine.overflow)
    assert seen == [False, False, True, True, False]


def a_step_that_fails_is_no_overflow(rank: int, world: int) -> None:
    engine = engine_over_terms()
    step_with(engine, NAN, 1.0)
    engine.backward(engine(1.0, 1.0))
    with pytest.raises(StepError, match="inference_mode"), torch.inference_mode():
        engine.step()
    assert not engine.overflow


def another_scheduler_is_stepped_instead(rank: int, world: int) -> None:
    engine = engine_over_terms(lr_scheduler=torch.optim.lr_scheduler.ConstantLR)
    step_with(engine, 1.0, 1.0)
    engine.lr_scheduler = noted = _Noted(engine.optimizer)
    engine.backward(engine(1.0, 1.0))
    engine.step({"note": "a second"})
    assert engine.lr_scheduler is noted and noted.notes == [None, "a second"]
    engine.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(engine.optimizer)
    engine.backward(engine(1.0, 1.0))
    with pytest.raises(StepError, match="cannot be stepped with lr_kwargs"):
        engine.step({"note": "its step takes none"})


def without_a_scheduler_rates_stay(rank: int, world: int) -> None:
    engine = engine_over_terms({"scheduler": {"type": "WarmupLR", "params": {}}})
    before = engine.get_lr()
    engine.lr_scheduler = None
    step_with(engine, 1.0, 1.0)
    assert engine.lr_scheduler is None and engine.get_lr() == before


def what_cannot_be_stepped_is_no_scheduler(rank: int, world: int) -> None:
    engine = engine_over_terms()
    for value in (3, lambda optimizer: None, torch.optim.lr_scheduler.ConstantLR):
        with pytest.raises(ConfigError, match="expected a learning rate scheduler"):
            engine.lr_scheduler = value
    assert engine.lr_scheduler is None


def an_optimizer_is_not_assigned(rank: int, world: int) -> None:
    engine = engine_over_terms()
    before = engine.optimizer
    with pytest.raises(StepError, match="optimizer cannot be assigned"):
        engine.optimizer = torch.optim.SGD([torch.zeros(1)])
    assert engine.optimizer is before


def unknown_attributes_are_the_modules(rank: int, world: int) -> None:
    engine = engine_over_terms()
    assert engine.a is engine.module.a
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = engine.no_such_thing
    assert all(key.startswith("module.") for key in engine.state_dict())


SCENARIOS = [
    a_step_is_counted_at_the_boundary_only,
    weights_move_at_the_boundary_only,
    was_step_applied_speaks_of_the_last_step,
    the_boundary_is_every_last_micro_batch,
    an_overridden_boundary_sticks,
    no_sync_accumulates_until_a_backward_outside,
    a_step_inside_no_sync_is_an_error,
    zero_grad_drops_a_micro_batch,
    zero_grad_drops_what_no_sync_kept,
    the_norm_is_that_of_the_mean_before_clipping,
    the_scheduler_steps_at_boundaries,
    lr_kwargs_reach_the_scheduler,
    a_skipped_step_counts_but_moves_nothing,
    batch_sizes_follow_the_configuration,
    a_new_train_batch_size_changes_the_accumulation,
    a_new_train_batch_size_begins_a_window_of_its_own,
    a_new_micro_batch_size_keeps_the_accumulation,
    backward_returns_the_loss_divided_by_the_accumulation,
    train_and_eval_return_the_engine,
    momenta_and_rates_are_listed_by_group,
    a_rate_changed_by_hand_is_used,
    overflow_speaks_of_the_last_boundary,
    a_step_that_fails_is_no_overflow,
    another_scheduler_is_stepped_instead,
    without_a_scheduler_rates_stay,
    what_cannot_be_stepped_is_no_scheduler,
    an_optimizer_is_not_assigned,
    unknown_attributes_are_the_modules,
]


@pytest.mark.parametrize(
    ("world", "stage"), [(1, 0), (2, 0), pytest.param(2, 1, marks=pytest.mark.slow), (2, 2), (2, 3)]
)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_control(scenario: Callable[[int, int], None], world: int, stage: int) -> None:
    ranks.shared(world, at_each_stage, stage, scenario)


def _hold_back_at_stage(rank: int, world: int, stage: int) -> None:
    changes = {"zero_optimization": {"stage": stage}}
    engine = engine_over_terms(changes, accumulation=2)
    with engine.no_sync():
        engine.backward(engine(2.0, 20.0))
    step_with(engine, 4.0, 40.0)
    assert step_with(engine, 2.0, 2.0) == (-4.0, -31.0)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_no_sync_works_at_every_stage(stage: int) -> None:
    ranks.shared(2, _hold_back_at_stage, stage)


class _Long(Terms):
    """More than a socket's buffers take at once."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.zeros(1 << 22))
        self.b = torch.nn.Parameter(torch.zeros(1 << 22))


def _hold_while_the_peer_is_slow(rank: int, world: int) -> Weights:
    engine = engine_over_terms(at_stage(2), model=_Long())
    step_with(engine, 0.0, 0.0)
    time.sleep(
        0.5 * rank
    )  # rank 0's pass is still under way when its next gradients look for a place to rest
    engine.backward(engine(1.0, 1.0))
    with engine.no_sync():
        engine.backward(engine(8.0, 8.0))
    engine.step()
    return weights(engine)


def test_held_gradients_do_not_overwrite_what_is_being_sent() -> None:
    assert ranks.run(2, _hold_while_the_peer_is_slow) == [(-9.0, -9.0)] * 2
