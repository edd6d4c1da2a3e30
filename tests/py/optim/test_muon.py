"""`"type": "Muon"`: which parameters are its, what options each gets, and torch's arithmetic."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from catching import assert_told, caught
from models import TinyGPT
from terms import engine_over_terms
from zerort.errors import ConfigError
from zerort.memory import Form
from zerort.optim import build
from zerort.optim.muon import matrix

Muon = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(Muon is None, reason="torch.optim.Muon is torch 2.9's")


def made(model: nn.Module, params: Any = None, **options: Any) -> list[Optimizer]:
    given = model.parameters() if params is None else params
    return list(build("Muon", given, options, model).members)


def names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [name for name, p in model.named_parameters() if id(p) in held]


def of_muon(model: nn.Module, params: Any = None) -> list[str]:
    found = [m for m in made(model, params) if Muon is not None and isinstance(m, Muon)]
    return names(model, found[0]) if found else []


class Odd(nn.Module):
    """A convolution, two embeddings, matrices in a list, a head in front of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.bags = nn.EmbeddingBag(5, 8)
        self.conv = nn.Conv2d(3, 4, 2)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.tokens.weight
        self.gain = nn.Parameter(torch.ones(8))
        self.stack = nn.Parameter(torch.randn(2, 3, 4))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.last = nn.Linear(8, 6)


@needs_muon
def test_matrices_of_hidden_layers_are_muons_and_the_two_ends_are_not() -> None:
    gpt = TinyGPT()
    chosen = of_muon(gpt)
    assert chosen == [
        "position",
        *(
            f"layers.{at}.{part}.weight"
            for at in (0, 1)
            for part in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")
        ),
    ]
    # a tied head is the head, so that the layer registered last is hidden
    assert of_muon(Odd()) == ["stack", "conv.weight", "last.weight"]
    plain = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    assert of_muon(plain) == ["1.weight"]
    assert of_muon(nn.Sequential(nn.Linear(4, 4))) == []


@needs_muon
def test_an_authors_flag_decides_and_a_groups_before_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.use_muon = False
    model[2].weight.use_muon = True
    assert of_muon(model) == ["1.weight", "2.weight"]
    weights = [layer.weight for layer in model]
    biases = [layer.bias for layer in model]
    groups = [{"params": weights, "use_muon": True}, {"params": biases}]
    assert of_muon(model, groups) == ["0.weight", "1.weight", "2.weight"]
    groups = [{"params": weights[1:], "use_muon": False}, {"params": [weights[0], *biases]}]
    assert of_muon(model, groups) == []
    model[0].bias.use_muon = True
    for params in (None, [{"params": biases, "use_muon": True}]):
        error = caught(partial(made, model, params))
        assert_told(error, ConfigError, "parameter 0.bias of shape [4] is flagged use_muon")


@needs_muon
def test_options_reach_the_one_that_they_are_for() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    muon, adam = (m.param_groups[0] for m in made(model, lr=0.02, weight_decay=0.01))
    assert (muon["lr"], muon["weight_decay"], muon["momentum"]) == (0.02, 0.01, 0.95)
    assert (adam["lr"], adam["weight_decay"], adam["fused"]) == (0.02, 0.01, True)
    muon, adam = (
        m.param_groups[0]
        for m in made(
            model,
            lr=1.0,
            muon_lr=0.02,
            momentum=0.1,
            muon_momentum=0.9,
            nesterov=False,
            ns_steps=3,
            ns_coefficients=[3, -4, 2],
            eps=1e-6,
            adjust_lr_fn="match_rms_adamw",
            adam_lr=3e-4,
            adam_betas=[0.8, 0.9],
            adam_eps=1e-5,
            adam_weight_decay=0.5,
        )
    )
    keys = ("lr", "momentum", "nesterov", "ns_steps", "ns_coefficients", "eps", "adjust_lr_fn")
    got = tuple(muon[key] for key in keys)
    assert got == (0.02, 0.9, False, 3, (3, -4, 2), 1e-6, "match_rms_adamw")
    assert muon["weight_decay"] == 0.0
    assert tuple(adam[key] for key in ("lr", "betas", "eps", "weight_decay")) == (
        3e-4,
        (0.8, 0.9),
        1e-5,
        0.5,
    )
    _, adam = (m.param_groups[0] for m in made(model, lr=0.02, betas=[0.5, 0.6]))
    assert adam["betas"] == (0.5, 0.6)


@needs_muon
def test_a_groups_own_options_come_before_the_configurations() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    decayed = [layer.weight for layer in model]
    rest = [layer.bias for layer in model]
    groups = [{"params": decayed, "lr": 0.5, "tag": "w"}, {"params": rest, "weight_decay": 0.0}]
    muon, adam = made(model, groups, lr=0.02, adam_lr=3e-4, adam_weight_decay=0.1)
    assert (muon.param_groups[0]["lr"], muon.param_groups[0]["tag"]) == (0.5, "w")
    assert [(g["lr"], g["weight_decay"]) for g in adam.param_groups] == [(3e-4, 0.1), (3e-4, 0.0)]
    groups = [{"params": [*decayed, *rest], "use_muon": False, "lr": 0.5, "eps": 1e-3}]
    (adam,) = made(model, groups, adam_lr=3e-4, adam_eps=1e-9)
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["eps"]) == (0.5, 1e-3)


@needs_muon
def test_what_the_configuration_cannot_mean_is_refused_with_what_it_takes() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for options, words in (
        ({"learning_rate": 1.0}, ("cannot be built with", "muon_lr", "adam_weight_decay")),
        ({"adjust_lr_fn": "mine"}, ("Adjust learning rate function mine is not supported",)),
        ({"adam_betas": [2.0, 0.9]}, ("Invalid beta parameter",)),
    ):
        assert_told(caught(partial(made, model, **options)), ConfigError, *words)


def test_an_older_torch_has_no_muon_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    error = caught(partial(made, model))
    assert_told(error, ConfigError, "Muon is torch's own from torch 2.9 on", torch.__version__)


# ---- training


class Conv(nn.Module):
    """A convolution in either memory format, a matrix that lies transposed, and two ends."""

    def __init__(self, form: torch.memory_format) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2)
        self.conv.weight = nn.Parameter(self.conv.weight.detach().contiguous(memory_format=form))
        self.wide = nn.Parameter((torch.randn(5, 24) * 0.1).t())
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1) @ self.wide).square().mean()


@needs_muon
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_convolution_is_a_matrix_of_its_memory_and_torchs_muon_updates_it(
    form: torch.memory_format,
) -> None:
    torch.manual_seed(3)
    model = Conv(form)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: dict[str, torch.Tensor] = {}
    for name in ("conv.weight", "wide"):
        model.get_parameter(name).register_hook(lambda g, name=name: seen.update({name: g}))
    engine = engine_over_terms(
        {"optimizer": {"type": "Muon", "params": {"lr": 0.1, "ns_steps": 3, "momentum": 0.0}}},
        model=model,
    )
    engine.backward(engine(torch.randn(2, 3, 3, 3)))
    engine.step()
    for name in ("conv.weight", "wide"):
        value, gradient = before[name], seen[name]
        if value.dim() > 2:
            order = (0, 2, 3, 1) if form is torch.channels_last else (0, 1, 2, 3)
            value, gradient = (t.permute(order).flatten(1) for t in (value, gradient))
        alone = nn.Parameter(value.clone())
        alone.grad = gradient.clone()
        Muon([alone], lr=0.1, ns_steps=3, momentum=0.0, weight_decay=0.0).step()
        end = model.get_parameter(name).detach()
        if end.dim() > 2:
            end = end.permute(order).flatten(1)
        assert torch.equal(end, alone.detach()), name
        assert not torch.equal(end, value)


def test_what_is_no_matrix_in_memory_is_named() -> None:
    assert matrix("a", Form((4, 3), (1, 4))) == Form((4, 3), (1, 4))
    assert matrix("a", Form((4, 3, 2), (6, 2, 1))) == Form((4, 6), (6, 1))
    assert matrix("a", Form((4, 3, 2), (1, 4, 12))) == Form((4, 6), (1, 4))
    assert matrix("a", Form((1, 3, 2), (1, 2, 1))) == Form((1, 6), (6, 1))
    error = caught(partial(matrix, "odd", Form((4, 3, 2), (2, 8, 1))))
    assert_told(error, ConfigError, "parameter odd of shape [4, 3, 2] is no matrix in memory")


@needs_muon
def test_rank_0_says_what_went_where(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "zerort"):
        engine_over_terms({"optimizer": {"type": "Muon", "params": {"lr": 0.1}}}, model=Odd())
    said = [record.message for record in caplog.records if " updates " in record.message]
    assert said[0].startswith(
        "Muon updates 3 parameters of 120 elements: stack, conv.weight, last."
    )
    assert said[1].startswith("AdamW updates 6 parameters of ") and "tokens.weight" in said[1]
