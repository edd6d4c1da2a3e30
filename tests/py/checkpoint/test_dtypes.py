"""What is not trained has any dtype, and is saved, restored and exported in it, to the bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ranks
from saved import config_of, engine_of
from zerort.checkpoint import get_fp32_state_dict, zero_to_fp32
from zerort.checkpoint.tensors import DTYPES
from zerort.errors import CheckpointError

HALF = (torch.float16, torch.bfloat16)


def values(dtype: torch.dtype, seed: int) -> Tensor:
    """(3, 4) of that dtype, of any bits that it has."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(3, 4, generator=generator) > 0.5
    size = 12 * dtype.itemsize
    bits = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(3, 4)


class Odd(nn.Module):
    """(batch, 4) -> (batch, 4), beside a frozen parameter and a buffer of every dtype."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Linear(4, 4)
        for number, (code, dtype) in enumerate(DTYPES.items()):
            kept = values(dtype, 100 * seed + number)
            self.register_parameter(f"param_{code}", nn.Parameter(kept, requires_grad=False))
            self.register_buffer(f"buffer_{code}", values(dtype, 100 * seed + number + 50))
        turned = torch.view_as_complex(torch.randn(3, 2)).conj()
        self.register_buffer("conjugate", turned)
        self.register_buffer("expanded", torch.randn(5).expand(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def odd_engine(seed: int, *, everything: bool) -> Any:
    """With all parameters in the optimizer, or with what trains."""
    model = Odd(seed)
    params = [p for p in model.parameters() if everything or p.requires_grad]
    return engine_of(config_of(2), model, torch.optim.SGD(params, lr=0.1), model_parameters=params)


def bits(state: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (
            value.dtype,
            bytes(value.resolve_conj().contiguous().view(-1).view(torch.uint8).tolist()),
        )
        for name, value in state.items()
    }


def save_and_load(rank: int, world: int, folder: str) -> list[str]:
    """What differs after a load, with the dtypes in the optimizer and out of it."""
    wrong = []
    for saved in (True, False):
        engine = odd_engine(0, everything=saved)
        engine.backward(engine(torch.ones(2, 4)).mean())
        engine.step()
        engine.save_checkpoint(folder, f"t{int(saved)}")
        engine.save_16bit_model(folder, "model.safetensors")
        engine.save_16bit_model(folder, "model.bin")
        expected = bits(engine.module.state_dict())
        for have in (True, False):
            other = odd_engine(1 + rank, everything=have)
            other.load_checkpoint(folder, f"t{int(saved)}")
            found = bits(other.module.state_dict())
            wrong += [
                f"{saved} {have} {name}" for name in expected if found[name] != expected[name]
            ]
            other.destroy()
    return wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    assert ranks.run(2, save_and_load, str(folder)) == [[], []]
    return folder


def expected_of(folder: Path) -> dict[str, tuple[torch.dtype, bytes]]:
    return bits(torch.load(folder / "model.bin", weights_only=True))


def test_every_dtype_comes_back_in_the_optimizer_and_out_of_it(folder: Path) -> None:
    found = expected_of(folder)
    fresh = bits(Odd(0).state_dict())
    assert all(found[name] == fresh[name] for name in fresh if not name.startswith("head"))


def test_exports_keep_every_dtype(folder: Path) -> None:
    assert bits(load_file(folder / "model.safetensors")) == expected_of(folder)


@pytest.mark.parametrize("tag", ["t0", "t1"])
def test_only_what_is_of_16_bits_in_floating_point_becomes_fp32(
    tag: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["zero_to_fp32.py", str(folder), str(tmp_path), "-t", tag, "--safe_serialization"]
    monkeypatch.setattr(sys, "argv", argv)
    assert zero_to_fp32.main() == 0
    expected = torch.load(folder / "model.bin", weights_only=True)
    wide = bits({n: v.float() if v.dtype in HALF else v for n, v in expected.items()})
    for found in (get_fp32_state_dict(folder, tag), load_file(tmp_path / "model.safetensors")):
        assert {n: found[n].dtype for n in wide} == {n: dtype for n, (dtype, _) in wide.items()}
        assert bits(found) == wide


@pytest.mark.parametrize("tensor", [torch.ones(3).to(torch.complex128), torch.ones(3).to_sparse()])
def test_a_tensor_that_the_format_cannot_hold_is_named(tensor: Tensor, tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    engine = engine_of(config_of(1), model)
    model.register_buffer("table", tensor)
    with pytest.raises(CheckpointError, match=r"buffer\.table is a .* tensor of .* no form for"):
        engine.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"table is a .* tensor of"):
        engine.save_16bit_model(tmp_path, "model.safetensors")


@pytest.mark.parametrize("code", DTYPES)
def test_client_state_keeps_tensors_of_every_dtype(code: str, tmp_path: Path) -> None:
    engine = engine_of(config_of(1), nn.Linear(2, 2))
    state = {"many": values(DTYPES[code], 3), "one": values(DTYPES[code], 4)[0, :1]}
    engine.save_checkpoint(tmp_path, "t", client_state=state)
    _, found = engine.load_checkpoint(tmp_path)
    assert bits(found) == bits(state)
