"""Optimizers by name: which class a configuration's name and options mean. How they train is in
`test_twin`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from terms import engine_over_terms, step_with
from zerort.errors import ConfigError
from zerort.optim import Lion, build


def built(name: str, **options: Any) -> torch.optim.Optimizer:
    return build(name, [nn.Parameter(torch.zeros(4))], options, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("Adam", {}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": True, "torch_adam": True}, torch.optim.AdamW),
        ("Adam", {"adam_w_mode": False}, torch.optim.Adam),
        ("adam", {"bias_correction": True}, torch.optim.AdamW),
        ("AdamW", {}, torch.optim.AdamW),
        ("AdamW", {"torch_adam": True, "adam_w_mode": True}, torch.optim.AdamW),
        ("AdamW", {"adam_w_mode": False}, torch.optim.AdamW),
        ("FusedAdam", {"bias_correction": True, "set_grad_none": True}, torch.optim.AdamW),
        ("FusedAdam", {"adam_w_mode": False}, torch.optim.Adam),
        ("FusedLion", {}, Lion),
        ("SGD", {"momentum": 0.9}, torch.optim.SGD),
        ("Adagrad", {}, torch.optim.Adagrad),
        ("Lion", {}, Lion),
        ("RMSprop", {}, torch.optim.RMSprop),
        ("NAdam", {}, torch.optim.NAdam),
    ],
)
def test_a_name_means_a_class(
    name: str, options: dict[str, Any], kind: type[torch.optim.Optimizer]
) -> None:
    optimizer = built(name, lr=0.25, **options)
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad"])
def test_torchs_fused_implementation_is_used_unless_another_is_asked_for(name: str) -> None:
    assert built(name, lr=0.1).param_groups[0]["fused"] is True
    assert not built(name, lr=0.1, foreach=True).param_groups[0]["fused"]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "FusedAdam"])
def test_weight_decay_left_out_is_0_as_in_deepspeeds_own_adam_and_torchs_default_in_torchs(
    name: str,
) -> None:
    assert built(name, lr=0.1).param_groups[0]["weight_decay"] == 0.0
    assert built(name, lr=0.1, torch_adam=True).param_groups[0]["weight_decay"] == 0.01
    assert built(name, lr=0.1, weight_decay=0.5).param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("key", ["torch_adam", "adam_w_mode", "bias_correction"])
def test_a_switch_is_true_or_false(key: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.params.{key}: expected true or false, got"):
        built("AdamW", lr=0.1, **{key: "false"})


def test_a_name_that_is_refused_itself_is_no_guess() -> None:
    with pytest.raises(ConfigError) as caught:
        built("SparseAdm", lr=0.1)
    assert "SparseAdam" not in str(caught.value)


def test_a_name_of_neither_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"optimizer.type: 'AdmaW' is no optimizer .*did you mean AdamW"
    ):
        built("AdmaW")


def test_a_configured_optimizer_trains() -> None:
    engine = engine_over_terms({"optimizer": {"type": "SGD", "params": {"lr": 0.5}}})
    assert step_with(engine, 2.0, 4.0) == (-1.0, -2.0)


def test_one_that_is_given_wins_over_the_configured_one() -> None:
    changes = {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}}
    engine = engine_over_terms(changes, optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    assert step_with(engine, 2.0, 4.0) == (-2.0, -4.0)


def test_lion_takes_the_sign_of_the_interpolation_and_decays_apart_from_it() -> None:
    """Two steps by hand: lr 0.1, betas 0.9 and 0.5, decay 0.5, gradients 1 and then -0.5."""
    weight = nn.Parameter(torch.tensor([2.0]))
    lion = Lion([weight], lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    for gradient, expected in ((1.0, 2.0 * 0.95 - 0.1), (-0.5, (2.0 * 0.95 - 0.1) * 0.95 - 0.1)):
        # The second direction: 0.9 x 0.5 - 0.1 x 0.5 is positive, though the gradient is not.
        weight.grad = torch.tensor([gradient])
        lion.step()
        assert weight.item() == pytest.approx(expected)
    assert lion.state[weight]["exp_avg"].item() == 0.0  # (0 + 1) / 2, then (0.5 - 0.5) / 2
