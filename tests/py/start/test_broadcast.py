"""Everyone starts from rank 0's values, whatever their dtype and layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
import zerort
from catching import assert_told, caught
from zerort.errors import PlanError, PlanMismatch
from zerort.mesh.gloo import GlooComm
from zerort.start.broadcast import ROOM

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 0.0,
    "zerort": {"timeout": 20.0},
}


def drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    """Values of this rank's own."""
    values = torch.rand(shape) * 100
    return values > 50 if dtype is torch.bool else values.to(dtype)


def low() -> list[torch.dtype]:
    """Dtypes that no collective sums and most versions of torch have."""
    names = ("int8", "uint8", "int16", "int64", "bool", "float8_e4m3fn", "complex64", "uint16")
    return [getattr(torch, name) for name in names if hasattr(torch, name)]


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: drawn(torch.int64),
    "empty": lambda: drawn(torch.int8, 0, 3),
    "transposed": lambda: drawn(torch.float32, 3, 4).t(),
    "every_other": lambda: drawn(torch.int16, 8)[::2],
    "expanded": lambda: drawn(torch.float32, 3, 1).expand(3, 4),
    "channels_last": lambda: drawn(torch.float32, 2, 3, 4, 4).to(memory_format=torch.channels_last),
    "conjugate": lambda: drawn(torch.complex64, 3).conj(),
}


class Mixed(nn.Linear):
    """A layer that trains among frozen parameters and buffers of many kinds."""

    def __init__(self, rank: int) -> None:
        torch.manual_seed(1 + rank)
        super().__init__(4, 4)
        made = {str(dtype)[6:]: drawn(dtype, 5) for dtype in low()}
        for name, value in list(made.items())[:: -1 if rank else 1]:
            self.register_buffer(f"buffer_{name}", value)
            frozen = nn.Parameter(value.clone(), requires_grad=False)
            self.register_parameter(f"frozen_{name}", frozen)
        for name, make in LAYOUTS.items():
            self.register_buffer(name, make())


def sgd(model: nn.Linear) -> torch.optim.Optimizer:
    return torch.optim.SGD([model.weight, model.bias], lr=0.1)


def state_of(model: nn.Module) -> dict[str, tuple[list[Any], str, tuple[int, ...]]]:
    def values(tensor: Tensor) -> list[Any]:
        wide = torch.complex128 if tensor.is_complex() else torch.float64
        return tensor.detach().to(wide).tolist()  # type: ignore[no-any-return]

    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: (values(t), str(t.dtype), t.stride()) for name, t in named}


def start(rank: int, world: int) -> tuple[Any, Any]:
    model = Mixed(rank)
    before = state_of(model)
    engine, *_ = zerort.initialize(model=model, optimizer=sgd(model), config=CONFIG)
    engine.backward(engine(torch.ones(1, 4)).sum() * 0)
    engine.step()
    return before, state_of(model)


@ranks.once(None)
def started() -> list[tuple[Any, Any]]:
    return ranks.run(2, start)


@pytest.mark.parametrize("name", sorted(state_of(Mixed(0))))
def test_a_tensor_of_any_dtype_and_layout_has_rank_0s_values_and_its_own_form(name: str) -> None:
    (first, _), (other, _) = started()
    for _, after in started():
        assert after[name] == first[name]
    if name != "empty":
        assert other[name] != first[name], "the ranks began alike: nothing was shown"


# ---- what cannot be brought to all ranks


def longer(rank: int) -> nn.Linear:
    model = nn.Linear(4, 4)
    model.register_buffer("seen", torch.zeros(3 + rank))
    return model


def other_dtype(rank: int) -> nn.Linear:
    model = nn.Linear(4, 4)
    frozen = torch.zeros(3, dtype=(torch.int8, torch.uint8)[rank])
    model.register_parameter("base", nn.Parameter(frozen, requires_grad=False))
    return model


def one_more(rank: int) -> nn.Linear:
    model = nn.Linear(4, 4)
    if rank:
        model.register_buffer("extra", torch.zeros(3))
    return model


def sparse(rank: int) -> nn.Linear:
    model = nn.Linear(4, 4)
    model.register_buffer("graph", torch.eye(3).to_sparse())
    return model


def on_meta(rank: int) -> nn.Linear:
    model = nn.Linear(4, 4)
    model.register_buffer("later", torch.zeros(3, device="meta"))
    return model


REFUSED: dict[str, tuple[Callable[[int], nn.Linear], type[Exception], list[str]]] = {
    "longer": (longer, PlanMismatch, ["models", "seen", "[3]", "rank 0", "[4]", "rank 1"]),
    "other_dtype": (other_dtype, PlanMismatch, ["base", "int8", "uint8"]),
    "one_more": (one_more, PlanMismatch, ["extra", "nothing on rank 0"]),
    "sparse": (sparse, PlanError, ["graph", "sparse"]),
    "on_meta": (on_meta, PlanError, ["buffer later", "meta", "to_empty"]),
}


def refusals(rank: int, world: int) -> dict[str, Exception | None]:
    found = {}
    for name, (make, _, _) in REFUSED.items():
        model = make(rank)
        optimizer = sgd(model)
        found[name] = caught(
            lambda model=model, optimizer=optimizer: zerort.initialize(
                model=model, optimizer=optimizer, config=CONFIG
            )
        )
    return found


@ranks.once(None)
def refused() -> list[dict[str, Exception | None]]:
    return ranks.run(2, refusals)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_brought_to_all_ranks_is_refused_by_name(name: str) -> None:
    _, kind, words = REFUSED[name]
    for found in refused():
        assert_told(found[name], kind, *words)


# ---- how it is sent


class Loose(nn.Module):
    """Many small frozen tensors of several dtypes, empty ones among them, and one large one."""

    def __init__(self, rank: int) -> None:
        torch.manual_seed(1 + rank)
        super().__init__()
        kinds = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
        for number in range(120):
            value = drawn(kinds[number % 4], number % 7, 5)
            frozen = nn.Parameter(value, requires_grad=False)
            self.register_parameter(f"small_{number}", frozen)
        self.register_parameter("large", nn.Parameter(torch.randn(ROOM // 4 + 3)))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.full((3,), float(rank)))
        self.register_buffer("statistics", drawn(torch.float64, 9))


def sent(rank: int, world: int) -> tuple[list[int], dict[str, Any], dict[str, int]]:
    """The sizes of what an engine that only runs forward sends, what it has then, and where."""
    model, sizes = Loose(rank), []
    places = {name: tensor.data_ptr() for name, tensor in state_tensors(model).items()}
    send = GlooComm.broadcast

    def counted(self: GlooComm, buffer: Tensor, source: int = 0) -> None:
        sizes.append(buffer.nbytes)
        send(self, buffer, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlooComm, "broadcast", counted)
        patch.setattr("zerort.start.broadcast.ROOM", 4000)
        engine = zerort.initialize(model=model, config=CONFIG)[0]
    assert engine.optimizer is None
    del model.large
    moved = [n for n, t in state_tensors(model).items() if t.data_ptr() != places[n]]
    assert not moved, moved
    return sizes, state_of(model), {n: t.nbytes for n, t in state_tensors(model).items()}


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def test_small_tensors_are_sent_together_in_messages_of_a_buckets_size() -> None:
    (sizes, first, nbytes), (others, second, _) = ranks.run(2, sent)
    assert first == second
    assert sizes == others
    large = (ROOM // 4 + 3) * 4
    assert sum(sizes) == sum(nbytes.values()) + large, "each byte once, and no other"
    small = [size for size in sizes if size != large]
    assert max(small) <= 4000
    assert len(small) <= -(-sum(nbytes.values()) // 3500) + 1
    assert len(small) < 10 < len(nbytes)
