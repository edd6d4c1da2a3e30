"""Models whose constructors do everything with parameters that constructors do."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16


class Layer(nn.Module):
    """Changes its children's parameters after they are complete."""

    def __init__(self, seen: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, 2 * WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.second = nn.Linear(2 * WIDTH, WIDTH)
        nn.init.normal_(self.first.weight, std=0.02)
        self.first.weight.data.mul_(2.0)
        self.first.weight.data[3].zero_()
        with torch.no_grad():
            self.first.bias[1:4] = 0.5
            self.first.bias += 1.0
        nn.init.trunc_normal_(self.first.bias, std=0.1)
        if seen is not None:
            seen()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.gelu(self.first(self.norm(x)))) * self.scale


class Copied(nn.Module):
    """Layers that are copies of one."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Linear(WIDTH, WIDTH)
        layer = Layer()
        other = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        self.fresh = copy.deepcopy(other)
        del layer, other

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fresh(self.entry(x))


class Net(nn.Module):
    """Tied, read, frozen, orthogonal, initialised by `apply` and by a loop over parameters."""

    def __init__(self, layers: int = 3, seen: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList(Layer(seen) for _ in range(layers))
        self.copies = Copied()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0, batch_first=True),
            2,
            enable_nested_tensor=False,
        )
        self.read = nn.Parameter(self.layers[0].first.weight[:WIDTH].clone() + 1)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.table.weight
        nn.init.orthogonal_(self.layers[1].second.weight)
        self.layers[-1].norm.requires_grad_(False)
        self.apply(self._start)
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        alias = self.layers[0].second.weight.data
        nn.init.kaiming_uniform_(self.copies.entry.weight)
        alias[0] = 7.0  # an alias that was taken two operations ago
        self.register_buffer("steps", torch.arange(4.0))

    def _start(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            module.weight.data.normal_(std=0.3)
            module.weight.data[module.padding_idx].zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for layer in self.layers:
            x = layer(x)
        x = self.encoder(self.copies(x) @ self.read)
        return self.head(x)


class Reparametrised(nn.Module):
    """Recurrent layers refer to their parameters weakly; parametrizations replace them."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.spectral(self.normed(self.recurrent(x)[0]))
        return x + sum(p.sum() for p in self.listed)


class Again(nn.Module):
    """A Parameter that is made of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third = nn.Parameter(self.first.weight, requires_grad=False)


def bytes_held() -> int:
    """Of all storages that tensors of this process have."""
    gc.collect()
    with torch._C.DisableTorchFunctionSubclass():
        storages = {
            tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
            for tensor in gc.get_objects()
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu"
        }
    return sum(storages.values())
