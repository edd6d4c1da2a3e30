"""The flops profiler without an engine: numbers as recorded, in every torch that is supported, and
nothing left behind.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from zerort.errors import ConfigError
from zerort.profiling import FlopsProfiler, get_model_profile, strings
from zerort.profiling.costs import Node, tree
from zerort.profiling.formulas import FORMULAS

RECORDED = json.loads((Path(__file__).parents[2] / "data" / "flops.json").read_text())
MODELS = RECORDED["models"]
CLASSES: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
exec("\n".join(RECORDED["classes"]), CLASSES)

RIGHT = {
    "matmul_vector": 2 * 12,
    "lstm": 5040,
    "lstm_bi": 5280,
    "lstm_time_first": 2640,
    "mha": 6720,
    "encoder_layer": 11840,
}
"""What torch alone takes for none."""


def built(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    inputs = MODELS[name]["inputs"]
    module = eval(MODELS[name]["module"], CLASSES)
    if isinstance(inputs, str):
        return module, (eval(inputs, CLASSES),)
    return module, tuple(torch.randn(shape) for shape in inputs)


def flops_of(module: nn.Module, *inputs: Any) -> int:
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    module(*inputs)
    profiler.stop_profile()
    return int(profiler.get_total_flops())


def nodes(node: Node, name: str = "") -> dict[str, Node]:
    found = {name: node}
    for child in node.children:
        found |= nodes(child, f"{name}.{child.name}".strip("."))
    return found


# ---- the numbers


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_flops_macs_and_parameters_are_the_recorded_ones(name: str, grad: bool) -> None:
    module, inputs = built(name)
    expected = RIGHT.get(name, MODELS[name]["torch"]["flops"])
    with torch.set_grad_enabled(grad):
        found = get_model_profile(module, args=inputs, print_profile=False, as_string=False)
    assert found == (expected, expected // 2, MODELS[name]["deepspeed"]["params"])


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name]["torch"]["modules"]])
def test_every_module_has_the_flops_that_torch_recorded_for_it(name: str) -> None:
    module, inputs = built(name)
    profiler = FlopsProfiler(module.eval())
    profiler.start_profile()
    module(*inputs)
    profiler.stop_profile()
    found = nodes(tree(module, profiler._recording))
    root = type(module).__name__
    for path, flops in MODELS[name]["torch"]["modules"].items():
        node = found[path.removeprefix(root).removeprefix(".")]
        assert node.cost.flops == sum(flops.values()), path
    for path, (_, _, params) in MODELS[name]["deepspeed"].get("modules", {}).items():
        assert found[path].cost.params == params, path


def test_a_list_of_layers_costs_what_its_layers_do() -> None:
    module, inputs = built("gpt")
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    module(*inputs)
    profiler.stop_profile()
    found = nodes(tree(module, profiler._recording))
    each = [found[f"blocks.{index}"].cost for index in range(2)]
    blocks = found["blocks"].cost
    assert blocks.flops == sum(cost.flops for cost in each) == 33920
    assert blocks.seconds == pytest.approx(sum(cost.seconds for cost in each))
    assert 0 < blocks.seconds < found[""].cost.seconds


def test_a_module_that_stands_in_the_tree_twice_is_counted_as_often_as_it_runs() -> None:
    module, inputs = built("shared_module")
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    module(*inputs)
    profiler.stop_profile()
    found = nodes(tree(module, profiler._recording))
    assert found[""].cost.flops == found["a"].cost.flops == found["b"].cost.flops == 192


@pytest.mark.parametrize(
    ("operation", "shapes", "expected"),
    [
        (lambda m, v: m @ v, [(3, 4), (4,)], 24),
        (lambda v, w: v @ w, [(4,), (4,)], 8),
        (torch.vdot, [(4,), (4,)], 8),
        (torch.addmv, [(3,), (3, 4), (4,)], 24),
        (torch.addbmm, [(3, 5), (2, 3, 4), (2, 4, 5)], 240),
        (lambda x, w, y: F.bilinear(x, y, w), [(5, 4), (2, 4, 3), (5, 3)], 300),
        (lambda x: x.outer(x), [(4,)], 0),
        (lambda x: F.scaled_dot_product_attention(x, x, x), [(2, 3, 5, 4)], 2400),
    ],
)
def test_products_that_torch_takes_for_none_are_counted(
    operation: Callable[..., Any], shapes: list[tuple[int, ...]], expected: int
) -> None:
    class Operation(nn.Module):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return operation(*inputs)

    assert flops_of(Operation(), *map(torch.randn, shapes)) == expected


def test_formulas_of_accelerators_count_weights_once_a_step() -> None:
    steps, weights = (3, 2, 6), [(20, 6), (20, 5), (20,), (20,)]
    assert FORMULAS["_cudnn_rnn"](steps, weights, 4) == 2 * 6 * 220
    assert FORMULAS["_cudnn_rnn_backward"](steps, weights, 4) == 4 * 6 * 220
    assert FORMULAS["miopen_rnn"]((5, 6), weights, 4) == 2 * 5 * 220, "a packed sequence"
    qkv = (2, 3, 5, 4)
    assert FORMULAS["_scaled_dot_product_fused_attention_overrideable"](qkv, qkv, qkv) == 2400
    backward = FORMULAS["_scaled_dot_product_flash_attention_for_cpu_backward"]
    assert backward(qkv, qkv, qkv, qkv, qkv) == 6000
    assert FORMULAS["_int_mm"]((3, 4), (4, 5)) == 120


@pytest.mark.parametrize(
    ("left", "right"),
    [((2, 3, 4), (2, 4, 5)), ((6, 4), (2, 4, 5)), ((2, 3, 4), (4, 10)), ((3, 8), (8, 5))],
)
def test_a_grouped_product_is_what_its_groups_are(left: Any, right: Any) -> None:
    assert FORMULAS["_grouped_mm"](left, right) == 2 * 2 * 3 * 4 * 5


def test_a_formula_of_torchs_own_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flop_registry, torch.ops.aten.mv, lambda *_, **__: 7)
    module, inputs = built("matmul_vector")
    assert flops_of(module, *inputs) == 7


# ---- what is counted


@pytest.mark.parametrize("reentrant", [True, False])
def test_only_forwards_are_counted_and_no_activation_twice(reentrant: bool) -> None:
    class Recomputes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)

    module = Recomputes()
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    loss = module(torch.ones(3, 4, requires_grad=True)).sum()
    torch.ones(9, 9) @ torch.ones(9, 9)
    seconds = profiler.get_total_duration()
    loss.backward()
    profiler.stop_profile()
    assert profiler.get_total_flops() == 192
    assert profiler.get_total_duration() == seconds
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_another_threads_forward_is_not_counted_and_ends_nothing() -> None:
    class Evaluates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            evaluation = threading.Thread(target=self.other, args=(x,))
            evaluation.start()
            evaluation.join()
            return self.first(x)

    module = Evaluates()
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    module(torch.ones(3, 4))
    profiler.stop_profile()
    found = nodes(tree(module, profiler._recording))
    assert {name: node.cost.flops for name, node in found.items()} == {
        "": 96,
        "first": 96,
        "other": 0,
    }
    assert found["other"].cost.seconds == 0 < found["first"].cost.seconds


@pytest.mark.filterwarnings("ignore:FlopCounterMode does not have")
def test_an_operator_without_a_formula_is_run_all_the_same() -> None:
    if "skip_unsupported" not in inspect.signature(FlopCounterMode).parameters:
        pytest.skip("this torch refuses what it cannot count")

    class Higher(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            product = torch.ops.aten.mm.default
            return torch.ops.higher_order.out_dtype(product, torch.int32, x, x.t())

    x = torch.arange(6, dtype=torch.int8).view(2, 3)
    module = Higher()
    expected = module(x)
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    found = module(x)
    profiler.stop_profile()
    assert torch.equal(found, expected)


def test_an_ignored_class_is_part_of_what_calls_it() -> None:
    module, inputs = built("mlp")
    profiler = FlopsProfiler(module)
    profiler.start_profile(ignore_list=[nn.Linear])
    module(*inputs)
    profiler.stop_profile()
    found = nodes(tree(module, profiler._recording))
    assert found["0"].cost.flops == found["2"].cost.flops == 0
    assert found[""].cost.flops == 1152


class Writer(nn.Module):
    """Writes `length` tokens; what it does beside its own forward is its own too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def generate(self, x: torch.Tensor, length: int) -> torch.Tensor:
        for _ in range(length):
            x = self(x) @ torch.eye(4)
        return x


def test_generating_is_counted_with_what_surrounds_the_forwards() -> None:
    found = get_model_profile(
        Writer(),
        args=[torch.ones(3, 4)],
        kwargs={"length": 5},
        mode="generate",
        print_profile=False,
        as_string=False,
    )
    assert found == (5 * 2 * 96, 5 * 96, 16)


@pytest.mark.parametrize("inside", [True, False], ids=["in place", "wrapped"])
@pytest.mark.parametrize("ran", [True, False], ids=["that has run", "that has not run"])
def test_a_compiled_model_is_counted_and_stays_compiled(inside: bool, ran: bool) -> None:
    compiled: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compiled.append(1)

        def kernel(*args: Any) -> Any:
            with _disable_current_modes():  # as a compiled kernel, it cannot be looked into
                return graph.forward(*args)

        return kernel

    torch._dynamo.reset()
    module: Any = Writer()
    inputs = (torch.ones(3, 4),)
    plain = module(*inputs)
    if inside:
        module.compile(backend=backend)
    else:
        module = torch.compile(module, backend=backend)
    if ran:
        module(*inputs)
    assert flops_of(module, *inputs) == 96
    assert len(compiled) == ran
    assert torch.equal(module(*inputs), plain)
    assert len(compiled) == 1
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_a_scripted_model_is_counted_as_a_whole() -> None:
    module, inputs = built("mlp")
    traced = torch.jit.trace(module, inputs)
    assert get_model_profile(traced, args=inputs, print_profile=False, as_string=False)[0] == 1152


# ---- what is left behind


def test_nothing_is_replaced_in_torch_and_two_profiles_agree() -> None:
    names = [(torch, "bmm"), (torch, "matmul"), (F, "scaled_dot_product_attention"), (F, "linear")]
    before = [getattr(owner, name) for owner, name in names] + [torch.Tensor.__matmul__]
    module, inputs = built("gpt")
    found = [get_model_profile(module, args=inputs, print_profile=False) for _ in range(3)]
    after = [getattr(owner, name) for owner, name in names] + [torch.Tensor.__matmul__]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert len(set(found)) == 1
    left = [part for part in module.modules() if part._forward_hooks or part._forward_pre_hooks]
    assert left == []
    assert {*vars(module)} == {*vars(built("gpt")[0])}


class Raises(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.first, self.error = nn.Linear(4, 4), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if not self.training:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_a_model_that_raises_leaves_no_hook_no_counter_and_its_own_mode(
    error: BaseException,
) -> None:
    module = nn.Sequential(nn.Linear(4, 4), Raises(error), nn.Linear(4, 4).eval())
    modes = [part.training for part in module.modules()]
    with pytest.raises(type(error)):
        get_model_profile(module, args=[torch.ones(3, 4)], warm_up=0, print_profile=False)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert [part.training for part in module.modules()] == modes
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    # and the next profile is right
    assert flops_of(module, torch.ones(3, 4)) == 3 * 96


def test_what_a_caught_exception_left_open_ends_with_its_parent() -> None:
    class Catches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.last = Raises(ValueError()), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.part(x)
            except ValueError:
                return self.last(x) @ torch.eye(4)

    module = Catches().eval()
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    module(torch.ones(3, 4))
    profiler.stop_profile()
    found = nodes(tree(module, profiler._recording))
    costs = {name: found[name].cost.flops for name in ("", "part", "last")}
    assert costs == {"": 288, "part": 96, "last": 96}


def test_training_under_a_profile_is_the_same_to_the_bit() -> None:
    def step(profiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        module = nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), nn.LSTM(8, 4)
        )
        profiler = FlopsProfiler(module)
        x = torch.randn(2, 5, 8)
        if profiled:
            profiler.start_profile()
        result = module(x)[0]
        if profiled:
            profiler.stop_profile()
        result.square().sum().backward()
        return [parameter.grad for parameter in module.parameters()]  # type: ignore[misc]

    for plain, profiled in zip(step(False), step(True), strict=True):
        assert torch.equal(plain, profiled)


# ---- the profiler's own calls


def test_numbers_stay_after_the_stop_and_go_with_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, inputs = built("mlp")
    profiler = FlopsProfiler(module)
    profiler.print_model_profile()
    profiler.start_profile()
    module(*inputs)
    profiler.stop_profile()
    module(*inputs)
    assert profiler.get_total_flops(as_string=True) == "1.15 K"
    assert profiler.get_total_macs(as_string=True) == "576 MACs"
    assert profiler.get_total_params(as_string=True) == "208"
    assert str(profiler.get_total_duration(as_string=True)).endswith("s")
    profiler.stop_profile()
    profiler.end_profile()
    assert profiler.get_total_flops() == profiler.get_total_duration() == 0
    profiler.print_model_profile()
    profiler.print_model_aggregated_profile()
    assert capsys.readouterr().out == ""


def test_a_reset_goes_on_from_zero_and_a_second_start_begins_anew() -> None:
    module, inputs = built("mlp")
    profiler = FlopsProfiler(module)
    profiler.start_profile()
    module(*inputs)
    profiler.reset_profile()
    module(*inputs)
    assert profiler.get_total_flops() == 1152
    profiler.start_profile()
    module(*inputs)
    module(*inputs)
    profiler.stop_profile()
    assert profiler.get_total_flops() == 2304
    assert not any(part._forward_hooks for part in module.modules())


@pytest.mark.parametrize("row", RECORDED["strings"]["rows"], ids=lambda row: str(row[0]))
def test_strings_are_the_recorded_ones(row: list[Any]) -> None:
    number, *expected = row
    names = ("number", "macs", "params", "flops", "duration")
    assert [getattr(strings, f"{name}_to_string")(number) for name in names] == expected


def test_the_results_are_strings_unless_numbers_are_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, inputs = built("mlp")
    assert get_model_profile(module, args=inputs) == ("1.15 K", "576 MACs", "208")
    assert module.training
    assert "208 = 100% Params, 576 MACs = 100% MACs" in capsys.readouterr().out


def test_an_input_of_a_shape_has_the_models_dtype_and_device() -> None:
    seen: list[torch.Tensor] = []
    module = nn.Linear(8, 4).to(torch.bfloat16)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert get_model_profile(module, (3, 8), print_profile=False)[0] == "192 "
    assert (seen[0].dtype, tuple(seen[0].shape)) == (torch.bfloat16, (3, 8))
    meta = nn.Linear(8, 4, device="meta")
    assert get_model_profile(meta, (3, 8), print_profile=False)[0] == "192 "
    assert get_model_profile(nn.ReLU(), (3, 8), print_profile=False)[0] == "0 "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": lambda x: x, "input_shape": (3,)}, "model must be a PyTorch module"),
        ({}, "args and/or kwargs must be specified if input_shape is None"),
        ({"input_shape": [3, 8]}, "input_shape must be a tuple"),
        ({"input_shape": ()}, "input_shape must have at least one element"),
        ({"input_shape": (3, 8), "mode": "train"}, 'expected "forward" or "generate"'),
        ({"input_shape": (3, 8), "mode": "generate"}, "Linear has no method generate"),
    ],
)
def test_what_cannot_be_profiled_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_model_profile(**{"model": nn.Linear(8, 4), "print_profile": False, **arguments})


# ---- the report


def report(capsys: pytest.CaptureFixture[str], name: str = "gpt", **options: Any) -> str:
    module, inputs = built(name)
    get_model_profile(module, args=inputs, **options)
    return capsys.readouterr().out


def test_the_report_has_a_summary_the_largest_modules_and_the_tree(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = report(capsys, top_modules=2, peak=1e12)
    for label, value in (
        ("params per GPU", "1.98 K"),
        ("fwd MACs per GPU", "17.84 KMACs"),
        ("fwd flops per GPU", "35.68 K"),
        ("peak FLOPS of cpu", "1 TFLOPS"),
    ):
        assert re.search(rf"^{label}: +{value} *$", text, re.MULTILINE), label
    assert re.search(r"^fwd MFU = fwd FLOPS per GPU / peak FLOPS: +\d+\.\d\d % *$", text, re.M)
    assert re.search(r"^2 +Block 1.74 K +Block 16.96 KMACs +Block .*s *$", text, re.MULTILINE)
    assert re.search(r"^3 ", text, re.MULTILINE) is None, "the deepest is in the tree"
    tree = text.split("Detailed profile")[1]
    for line in (
        r"^Gpt\($",
        r"^  1.98 K = 100% Params, 17.84 KMACs = 100% MACs, .*s = 100% latency, .*FLOPS$",
        r"^  \(blocks\): ModuleList\($",
        r"^      \(qkv\): Linear\(216 = 10.93% Params, 1.92 KMACs = 10.76% MACs, .* latency, "
        r".*FLOPS, in_features=8, out_features=24, bias=True\)$",
    ):
        assert re.search(line, tree, re.MULTILINE), line


@pytest.mark.parametrize("timed", [True, False])
def test_beside_an_engine_the_report_has_what_its_timers_say(
    timed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {"fwd": 400.0, "bwd": 1000.0, "step": 200.0, "fwd_microstep": 9.0}
    engine = SimpleNamespace(
        world_size=2,
        train_micro_batch_size_per_gpu=lambda: 3,
        gradient_accumulation_steps=lambda: 4,
        get_wall_clock_timers=lambda: times if timed else {},
    )
    module, inputs = built("mlp")
    profiler = FlopsProfiler(module, engine, recompute_fwd_factor=0.5)
    profiler.start_profile()
    module(*inputs)
    profiler.stop_profile()
    profiler.print_model_profile(profile_step=7)
    text = capsys.readouterr().out
    assert "Profile summary at step 7:" in text
    assert re.search(r"^world size: +2 *$", text, re.M)
    rows = {
        "fwd latency": "100 ms",
        "bwd latency": "250 ms",
        "step latency": "50 ms",
        "iter latency": "400 ms",
        "FLOPS per GPU = 3.5 * fwd flops per GPU / iter latency": "10.08 KFLOPS",
        "samples/second": "15.00",
    }
    for label, expected in rows.items():
        found = re.search(rf"^{re.escape(label)}: +{expected} *$", text, re.M)
        assert (found is not None) is timed, label


def test_the_report_can_be_shorter(capsys: pytest.CaptureFixture[str]) -> None:
    text = report(capsys, detailed=False, module_depth=1)
    assert "Detailed" not in text
    assert re.search(r"^0 +Gpt ", text, re.MULTILINE)
    assert re.search(r"^1 ", text, re.MULTILINE) is None
    assert "MFU" not in text, "nobody knows what a CPU can do"


def test_a_file_is_written_anew_and_its_folder_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deep" / "er" / "flops.txt"
    for _ in range(2):
        assert report(capsys, "mlp", output_file=str(path)) == ""
    assert path.read_text().count("Profile summary") == 1
    assert "\x1b" not in path.read_text()


def test_text_of_a_module_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(nn.Linear):
        def extra_repr(self) -> str:
            return "[red]size[/red] :smile:\n" + "x" * 300

    get_model_profile(Odd(4, 4), (3, 4))
    assert f"[red]size[/red] :smile: {'x' * 300})" in capsys.readouterr().out


def test_the_package_is_imported_without_the_counter_and_without_tables() -> None:
    wanted = ["torch.utils.flop_counter", "rich"]
    code = f"import sys, zerort; print([name for name in {wanted} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
