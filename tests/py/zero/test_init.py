"""A model that is built within `zero.Init` is the model that is built without, in parts."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ranks
import zerort
from built import WIDTH, Again, Layer, Net, Reparametrised, bytes_held
from training import keep
from zerort.zero import GatheredParameters, Init
from zerort.zero.born import Born
from zerort.zero.nursery import Nursery


def settings(stage: int = 3, dtype: str = "fp32") -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 700,
            "stage3_param_persistence_threshold": 20,
        },
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }


def plain(dtype: torch.dtype | None = None) -> Net:
    """Built as rank 0 builds it."""
    torch.manual_seed(7)
    model = Net()
    return model if dtype is None else model.to(dtype)


def born(rank: int, **arguments: Any) -> Net:
    torch.manual_seed(7 + rank)
    with Init(**arguments):
        return Net()


def values(model: nn.Module) -> dict[str, Tensor]:
    with GatheredParameters(list(model.parameters())):
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names under which they differ."""
    assert a.keys() == b.keys()
    return [
        name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])
    ]


def train(model: nn.Module, rank: int, config: dict[str, Any]) -> tuple[Any, list[float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = zerort.initialize(model=model, optimizer=optimizer, config=config)
    keep(engine)
    losses = []
    for step in range(3):
        x = (torch.arange(8).reshape(2, 4) * (rank + 1) + step) % 50
        loss = engine(x).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return engine, losses


def built(rank: int, world: int) -> dict[str, Any]:
    want = plain()
    numbers = torch.rand(2) if rank == 0 else None
    torch.manual_seed(7 + rank)
    before = torch.get_rng_state()
    with Init():
        model = Net()
    found = {"differs": equal(values(model), values(want))}
    if rank == 0:
        assert torch.equal(torch.rand(2), numbers)
    else:
        assert torch.equal(torch.get_rng_state(), before)
    found["tied"] = model.head.weight is model.table.weight
    found["frozen"] = [n for n, p in model.named_parameters() if not p.requires_grad]
    found["wants frozen"] = [n for n, p in want.named_parameters() if not p.requires_grad]
    found["shapes"] = all(
        a.shape == b.shape and a.stride() == b.stride()
        for a, b in zip(model.parameters(), want.parameters(), strict=True)
    )
    found["meta"] = {value.device.type for value in model.state_dict().values()}
    twin = copy.deepcopy(model)
    found["copy differs"] = equal(values(twin), values(want))
    try:
        model.table.weight.sum()
    except zerort.StepError as error:
        found["read outside"] = str(error)
    try:
        pickle.dumps(model.table.weight)
    except zerort.StepError as error:
        found["pickled"] = str(error)
    engine, found["losses"] = train(model, rank, settings())
    found["referred"] = [n for n, p in model.named_parameters() if weakref.getweakrefcount(p)]
    other, found["wanted"] = train(want, rank, settings())
    found["trained differs"] = equal(values(engine.module), values(other.module))
    return found


@ranks.once(None)
def built_on(world: int) -> list[dict[str, Any]]:
    return ranks.run(world, built, timeout=120)


@pytest.mark.parametrize("world", [1, 2])
def test_it_is_the_model_that_rank_0_would_have_built(world: int) -> None:
    for found in built_on(world):
        assert found["differs"] == []
        assert found["tied"] and found["shapes"]
        assert found["frozen"] == found["wants frozen"] != []


@pytest.mark.parametrize("world", [1, 2])
def test_it_trains_to_the_bit_like_a_model_that_was_there(world: int) -> None:
    for found in built_on(world):
        assert found["losses"] == found["wanted"]
        assert found["trained differs"] == []
        assert found["referred"] == []  # torch.utils.swap_tensors would refuse them


def test_values_are_not_to_be_had_before_an_engine_has_the_model() -> None:
    for found in built_on(2):
        assert found["meta"] == {"meta", "cpu"}  # its buffers are whole
        assert "parameter Embedding.weight is sharded and in no engine" in found["read outside"]
        assert "GatheredParameters" in found["read outside"]
        assert "Embedding.weight" in found["pickled"]
        assert found["copy differs"] == []


def reparametrised(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(7)
    want = Reparametrised()
    torch.manual_seed(7 + rank)
    with Init():
        model = Reparametrised()
    found: dict[str, Any] = {"differs": equal(values(model), values(want))}
    losses = []
    for each in (model, want):
        torch.manual_seed(1)  # one of them draws in its forward
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        engine, *_ = zerort.initialize(model=each, optimizer=optimizer, config=settings())
        keep(engine)
        for _ in range(2):
            loss = engine(torch.ones(2, 3, WIDTH)).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    found["losses"] = losses[:2], losses[2:]
    with Init():
        again = values(Again())
    found["again"] = torch.equal(again["third"], again["first.weight"])
    try:
        nn.Parameter(model.recurrent.weight_hh_l0)
    except zerort.StepError as error:
        found["made of it"] = str(error)
    return found


def test_layers_that_hold_or_replace_their_parameters_are_right() -> None:
    for found in ranks.run(2, reparametrised):
        assert found["differs"] == []
        assert found["losses"][0] == found["losses"][1]
        assert found["again"]
        assert (
            "recurrent.weight_hh_l0 is sharded, and nn.Parameter(...) would" in found["made of it"]
        )


def in_bf16(rank: int, world: int) -> dict[str, Any]:
    model = born(rank, config_dict_or_path=settings(dtype="bf16"))
    dtypes = {p.dtype for p in model.parameters()}
    differs = equal(values(model), values(plain().to(torch.bfloat16)))
    engine, losses = train(model, rank, settings(dtype="bf16"))
    twin = plain().to(torch.bfloat16)
    other, wanted = train(twin, rank, settings(dtype="bf16"))
    pairs = zip(engine.module.parameters(), other.module.parameters(), strict=True)
    read = zerort.utils.safe_get_full_fp32_param
    return {
        "dtypes": dtypes,
        "differs": differs,
        "losses": (losses, wanted),
        "masters": all(torch.equal(read(a), read(b)) for a, b in pairs),
    }


def test_it_is_born_in_the_configured_dtype_and_masters_follow() -> None:
    for found in ranks.run(2, in_bf16, timeout=120):
        assert found["dtypes"] == {torch.bfloat16}
        assert found["differs"] == []
        assert found["losses"][0] == found["losses"][1]
        assert found["masters"]


def below_stage_3(rank: int, world: int, stage: int) -> dict[str, Any]:
    made = born(rank, config_dict_or_path=settings(2))
    off = born(rank, enabled=False)
    kinds = {type(p) for model in (made, off) for p in model.parameters()}
    engine, losses = train(born(rank), rank, settings(stage))
    other, wanted = train(plain(), rank, settings(stage))
    return {
        "kinds": kinds,
        "losses": (losses, wanted),
        "differs": equal(values(engine.module), values(other.module)),
    }


@pytest.mark.parametrize("stage", [0, 2])
def test_below_stage_3_nothing_is_sharded_and_what_is_becomes_whole(stage: int) -> None:
    for found in ranks.run(2, below_stage_3, stage, timeout=120):
        assert found["kinds"] == {nn.Parameter}
        assert found["losses"][0] == found["losses"][1]
        assert found["differs"] == []


def written(rank: int, world: int) -> dict[str, Any]:
    model = born(rank)
    weight, bias = model.layers[0].first.weight, model.layers[0].first.bias
    with GatheredParameters([weight, bias], modifier_rank=0), torch.no_grad():
        if rank == 0:
            weight.fill_(3.0)
            bias.copy_(torch.arange(2.0 * WIDTH))
    with GatheredParameters(weight), GatheredParameters([weight, bias]):
        found: dict[str, Any] = {"weight": weight.unique().tolist(), "bias": bias.tolist()}
    try:
        with GatheredParameters(weight), torch.no_grad():
            weight.zero_()
    except zerort.StepError as error:
        found["lost"] = str(error)
    with GatheredParameters(weight):
        found["still"] = weight.unique().tolist()
    try:
        with GatheredParameters([weight], modifier_rank=0):
            raise KeyError(rank)
    except KeyError:
        found["raised"] = True
    everything = list(model.parameters())
    with GatheredParameters(everything[::-1] if rank else everything, modifier_rank=0):
        if rank == 0:
            model.load_state_dict(
                {k: torch.full_like(v, 0.5) for k, v in plain().state_dict().items()}
            )
    loaded = values(model)
    found["loaded"] = {float(value.unique()) for value in loaded.values()}
    try:
        model.load_state_dict(plain().state_dict())
    except RuntimeError as error:
        found["refused"] = str(error)
    torch.manual_seed(5 + rank)
    part = nn.Linear(4, 4)
    found["part"] = part.weight.detach().clone()
    Init(module=part)
    found["module"] = type(part.weight).__name__
    found["alike"] = values(part)["weight"]
    torch.manual_seed(rank)
    outside = nn.Linear(4, 4)
    found["as built"] = outside.weight.detach().clone()
    with Init():
        mixed = nn.Sequential(nn.Linear(4, 4), outside)
    found["outside"] = values(mixed)["1.weight"]
    return found


def test_what_the_modifier_rank_writes_is_everybodys() -> None:
    first, other = ranks.run(2, written)
    for found in (first, other):
        assert found["weight"] == found["still"] == [3.0]
        assert found["bias"] == list(range(2 * WIDTH))
        assert "Linear.weight was written inside GatheredParameters" in found["lost"]
        assert found["raised"]
        assert found["loaded"] == {0.5}
        assert "modifier_rank=0" in found["refused"] and "Linear.weight" in found["refused"]
        assert found["module"] == "Sharded"
    for found in (first, other):  # rank 0's, where ranks have built different ones
        assert torch.equal(found["alike"], first["part"])
        assert torch.equal(found["outside"], first["as built"])


class Raises(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layer = Layer()
        if rank == 1:
            raise KeyError("no such table")
        self.layer.first.weight.data.mul_(self.layer.scale.sum())


class Differs(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.layers[rank].first.weight.data.clamp_(0).add_(self.layers[rank].scale.sum())


def failing(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    state = torch.get_rng_state()
    for kind in (Raises, Differs):
        try:
            with Init():
                kind(rank)
        except (KeyError, zerort.PlanError) as error:
            found[kind.__name__] = f"{type(error).__name__}: {error}"
    try:
        with Init():
            if rank == 0:
                raise KeyError("at once")
    except (KeyError, zerort.PlanError) as error:
        found["at the end"] = f"{type(error).__name__}: {error}"
    found["state"] = rank == 0 or torch.equal(state, torch.get_rng_state())
    found["alone"] = type(nn.Linear(2, 2).weight)
    with Init(), Init(dtype=torch.bfloat16):
        model = Layer()
    found["again"] = {p.dtype for p in model.parameters()}
    return found


def test_a_rank_that_raises_or_builds_another_model_is_named_on_all() -> None:
    first, other = ranks.run(2, failing)
    assert "rank 1 raised KeyError: 'no such table'" in first["Raises"]
    assert other["Raises"] == "KeyError: 'no such table'"
    for found in (first, other):
        assert "ranks do not build the same model" in found["Differs"]
        assert found["alone"] is nn.Parameter
        assert found["state"]
        assert found["again"] == {torch.bfloat16}
    assert "KeyError" in first["at the end"]
    assert "rank 0 raised KeyError" in other["at the end"]


class ReadByOne(nn.Module):
    """As a constructor does that reads a file on rank 0, or sets nothing at all."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.read = nn.Parameter(torch.zeros(5, 3))
        self.alike = nn.Parameter(torch.ones(7))
        if rank == 0:
            with torch.no_grad():
                self.read[2:] = torch.arange(9.0).view(3, 3)
        else:
            self.unset = nn.Parameter(self.read.detach().clone().fill_(torch.nan))
            del self.unset
        self.inner = nn.Linear(3, 3)


class WrittenByOne(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.other = nn.Linear(2, 2)
        if rank == 1:
            nn.init.zeros_(self.inner.weight)


def of_one_rank(rank: int, world: int) -> dict[str, Any]:
    sent = []
    original = Nursery._level

    def level(self: Nursery, parameter: nn.Parameter, name: str, source: int) -> None:
        sent.append(name)
        original(self, parameter, name, source)

    Nursery._level = level  # type: ignore[method-assign]
    with Init():
        model = ReadByOne(rank)
    found: dict[str, Any] = {"values": values(model)["read"], "sent": sent}
    try:
        with Init():
            WrittenByOne(rank)
    except zerort.PlanError as error:
        found["written"] = str(error)
    with Init():  # nothing of that is left
        found["next"] = values(nn.Linear(2, 2))
    return found


def test_rank_zeros_values_count_where_a_constructor_makes_others_and_other_writes_are_named() -> (
    None
):
    for found in ranks.run(2, of_one_rank):
        assert found["values"][2:].flatten().tolist() == list(range(9))
        assert not found["values"][:2].any()
        assert found["sent"] == ["ReadByOne.read"]
        assert "rank 0 wrote nothing last" in found["written"]
        assert "rank 1 wrote Linear.weight (number" in found["written"]
        assert "by zero_ last" in found["written"]
        assert found["next"]["weight"].shape == (2, 2)


def frozen_base(rank: int, world: int) -> dict[str, Any]:
    with Init():
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.SGD(model[1].parameters(), lr=0.1), config=settings()
    )
    keep(engine)
    engine.backward(engine(torch.ones(1, 8)).sum())
    engine.step()
    with Init():
        nn.Linear(4, 4)  # is dropped
    return {"whole": values(model)["0.weight"]}


def test_what_the_optimizer_has_not_is_whole() -> None:
    first, other = ranks.run(2, frozen_base)
    assert torch.equal(first["whole"], other["whole"])


class Wide(nn.Module):
    def __init__(self, seen: Callable[[], object]) -> None:
        super().__init__()
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128)
        self.last = nn.Linear(128, 8)
        self.up.weight.data.mul_(2.0)
        nn.init.normal_(self.down.weight)
        self.up.weight.data[3].zero_()
        seen()


def tried_again(rank: int, world: int) -> dict[str, Any]:
    model = born(rank)
    strange = torch.optim.SGD(nn.Linear(2, 2).parameters() if rank else model.parameters(), lr=0.1)
    found: dict[str, Any] = {}
    try:
        zerort.initialize(model=model, optimizer=strange, config=settings())
    except zerort.PlanError as error:
        found["said"] = str(error)
    found["differs"] = equal(values(model), values(plain()))
    _, found["losses"] = train(model, rank, settings())
    return found


def test_a_start_that_fails_leaves_a_born_model_to_be_tried_again() -> None:
    for found in ranks.run(2, tried_again):
        assert "parameters that are not the model's" in found["said"]
        assert found["differs"] == []
        assert len(found["losses"]) == 3


def counted(rank: int, world: int) -> dict[str, int]:
    at_start = bytes_held()
    peak = 0

    def seen() -> None:
        nonlocal peak
        peak = max(peak, bytes_held() - at_start)

    with Init():
        model = nn.Sequential(*(Wide(seen) for _ in range(12)))
    size = sum(p.numel() * 4 for p in model.parameters())
    return {
        "peak": peak,
        "rest": bytes_held() - at_start,
        "size": size,
        "module": sum(p.numel() * 4 for p in model[0].up.parameters()),
    }


def test_a_rank_holds_its_part_of_the_model_and_one_module_while_it_is_built() -> None:
    for found in ranks.run(2, counted):
        assert found["rest"] <= 1.02 * found["size"] / 2
        assert found["peak"] <= found["rest"] + 1.2 * found["module"]


def started(rank: int, world: int) -> dict[str, Any]:
    start = bytes_held()
    with Init():
        model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(16)))
    peak = 0
    fill = Born.fill

    def counting(born: Born, view: Tensor) -> None:
        nonlocal peak
        fill(born, view)
        peak = max(peak, bytes_held() - start)

    Born.fill = counting  # type: ignore[method-assign]
    config = settings()
    config["zero_optimization"].update(reduce_bucket_size=21_000, stage3_max_live_parameters=70_000)
    engine, *_ = zerort.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), config=config
    )
    keep(engine)
    return {
        "size": sum(p.numel() * 4 for p in model.parameters()),
        "unit": max(u.numel for u in engine._parts.reduction.plan.units) * 4,
        "units": len(engine._parts.reduction.plan.units),
        "peak": peak,
    }


def test_an_engine_takes_a_born_model_a_unit_at_a_time() -> None:
    for found in ranks.run(2, started):
        part = found["size"] / 2
        assert found["units"] > 6
        # parts that are not taken yet, and shards and sums of all of them
        assert found["peak"] <= 1.02 * 3 * part + 1.5 * found["unit"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"mpu": object()}, "zero.Init(mpu=...)"),
        ({"remote_device": "nvme"}, "zero.Init(remote_device='nvme')"),
        ({"zero_quantized_weights": True}, "zero_quantized_weights"),
        ({"config": {"zero_optimization": {"stage": 7}}}, "zero_optimization.stage"),
    ],
)
def test_what_is_not_built_is_refused_by_name(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(zerort.ConfigError) as caught:
        Init(**arguments)
    assert named in str(caught.value)


def test_another_threads_modules_are_its_own_and_any_thread_may_build() -> None:
    with ThreadPoolExecutor(1) as pool:
        with Init():
            other = pool.submit(nn.Linear, 2, 2).result()
            own = nn.Linear(2, 2)
        with_init = pool.submit(built_here).result()
    assert type(other.weight) is nn.Parameter
    assert type(own.weight).__name__ == type(with_init.weight).__name__ == "Sharded"


def built_here() -> nn.Module:
    with Init():
        return nn.Linear(2, 2)


def test_sizes_that_are_not_known_yet_are_as_if_left_out() -> None:
    config = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"},
    }
    with Init(config_dict_or_path=config):
        layer = nn.Linear(2, 2)
    assert layer.weight.dtype == torch.bfloat16
    assert not dist.is_initialized()
