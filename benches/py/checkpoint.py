"""Saves and loads in MB/s, next to torch.save, safetensors and torch's distributed checkpoint, in
one interleaved run.

    python benches/py/checkpoint.py [--megabytes 256] [--rounds 7] [--folder DIR]
    python benches/py/checkpoint.py --beside 2 [--megabytes 1024] [--rounds 7] [--batch 64]

All hold the same tensors: fp32 weights and AdamW's two moments of one process. All sync their files
and the folder, so that a save that returned survives a power loss; only zerort also hashes, writes
a manifest and renames. Loads find the files in the page cache; zerort's verifies what it reads.
Medians, with the fastest and the slowest round, and the CPU time, which a busy machine changes
less.

With `--beside` so many ranks train, and what a save beside training costs them is shown instead:
its stall over a synchronous save of the same state, and a step while it is written over one while
nothing is, both as ratios within a round. Every round saves once each way; steps are timed before
the second save, and beside it until it is complete on all ranks. The first such save, which gets
its memory as well, has a line of its own.

A turn runs twice and the second counts. A virtual machine gives freed memory back, and the page
cache that touches it anew waits for the host (0.3 GB/s were seen, against 6): that is no
contender's doing, and the first run takes it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ranks
import zerort

Times = list[tuple[float, float]]
WIDTH = 1024
STEPS = 5
"""Timed while nothing is written."""
Contender = tuple[Callable[[Path], Any], Callable[[Path], Any]]


def engine_of(megabytes: int, device: torch.device | None = None) -> Any:
    """An engine that has stepped once, whose weights and moments have about so many megabytes on
    all ranks together.
    """
    layers = max(1, round(megabytes * 1e6 / 12 / (WIDTH * WIDTH)))
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for layer in model.parameters():  # what goes through keeps its size: denormals are slow
        nn.init.normal_(layer, std=WIDTH**-0.5)
    model.to(device or "cpu")
    engine, *_ = zerort.initialize(
        model=model,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
        },
    )
    step(engine, 1, device or torch.device("cpu"))
    return engine


def step(engine: Any, batch: int, device: torch.device) -> float:
    """One step; returns its seconds."""
    begun = time.perf_counter()
    engine.backward(engine(torch.randn(batch, WIDTH, device=device)).square().mean())
    engine.step()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begun


def tensors_of(engine: Any) -> dict[str, Tensor]:
    """Weights and moments as plain tensors, each with memory of its own."""
    found = {name: value.detach().clone() for name, value in engine.module.state_dict().items()}
    for index, state in enumerate(engine.optimizer.state.values()):
        found |= {f"{key}.{index}": value.clone() for key, value in state.items() if value.dim()}
    return found


def sync(path: Path) -> None:
    """A file or a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def contenders(engine: Any, tensors: dict[str, Tensor]) -> dict[str, Contender]:
    """Save and load of each, given a folder that is there and empty."""

    def with_torch(folder: Path) -> None:
        torch.save(tensors, folder / "t.pt")
        sync(folder / "t.pt")
        sync(folder)

    def with_safetensors(folder: Path) -> None:
        save_file(tensors, folder / "t.safetensors")
        sync(folder / "t.safetensors")
        sync(folder)

    def load_dcp(folder: Path) -> None:
        dcp.load(
            {name: torch.empty_like(value) for name, value in tensors.items()},
            checkpoint_id=str(folder / "d"),
        )

    return {
        "zerort": (lambda folder: engine.save_checkpoint(folder, "t"), engine.load_checkpoint),
        "safetensors": (
            with_safetensors,
            lambda folder: [
                value.clone() for value in load_file(folder / "t.safetensors").values()
            ],
        ),
        "DCP": (lambda folder: dcp.save(tensors, checkpoint_id=str(folder / "d")), load_dcp),
        "torch.save": (with_torch, lambda folder: torch.load(folder / "t.pt", weights_only=True)),
    }


def seconds(call: Callable[[Path], Any], folder: Path) -> tuple[float, float]:
    """How long the call takes, by the clock and in all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    call(folder)
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(found: dict[str, Contender], rounds: int, base: Path) -> dict[str, tuple[Times, Times]]:
    """Seconds of every save and load; a round runs all contenders, and each round begins with
    another.
    """
    times: dict[str, tuple[Times, Times]] = {name: ([], []) for name in found}
    names = list(found)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            for _ in range(2):
                os.sync()
                folder = Path(tempfile.mkdtemp(dir=base))
                took = [seconds(call, folder) for call in found[name]]
                shutil.rmtree(folder)
            for kept, figure in zip(times[name], took, strict=True):
                kept.append(figure)
    return times


def beside(device: torch.device, megabytes: int, rounds: int, batch: int, base: Path) -> None:
    """One rank of a run that saves beside its training; rank 0 prints."""
    engine = engine_of(megabytes, device)
    first = saved(engine, base, "memory", asynchronous=True)  # which gets the memory, too
    engine.wait_for_checkpoint()
    stalls, steps, writing, synchronous = [], [], [], []
    for number in range(rounds):
        at_once = saved(engine, base, f"{number}", asynchronous=False)
        synchronous.append(at_once)
        without = statistics.mean(step(engine, batch, device) for _ in range(STEPS))
        begun = time.perf_counter()
        stalls.append(saved(engine, base, f"{number}-beside", asynchronous=True) / at_once)
        during = []
        while not all_have_ended(engine):
            during.append(step(engine, batch, device))
        writing.append((time.perf_counter() - begun) / at_once)
        engine.wait_for_checkpoint()
        if during:
            steps.append(statistics.mean(during) / without)
        dist.barrier()
        if dist.get_rank() == 0:
            for tag in (f"{number}", f"{number}-beside"):
                shutil.rmtree(base / tag)
        os.sync()
    engine.destroy()
    if dist.get_rank() == 0:
        print(
            f"{megabytes} MB on {dist.get_world_size()} ranks, {rounds} rounds: median [min .. max]"
        )
        print(f"stall over a synchronous save     {spread(stalls)}")
        print(f"first stall over the median one   {first / statistics.median(synchronous):.3f}")
        print(f"writing over a synchronous save   {spread(writing)}")
        print(f"step while writing over one not   {spread(steps)}")


def saved(engine: Any, base: Path, tag: str, *, asynchronous: bool) -> float:
    """Saves; returns how long the call took, once all ranks are at it."""
    dist.barrier()
    begun = time.perf_counter()
    engine.save_checkpoint(base, tag, asynchronous=asynchronous)
    return time.perf_counter() - begun


def all_have_ended(engine: Any) -> bool:
    """Whether no rank writes any more."""
    writer = engine._checkpoints.background._writer
    flag = torch.tensor([float(writer is not None and not writer.ended.is_set())])
    engine._parts.mesh.control.all_reduce(flag)
    return not flag.item()


def spread(ratios: list[float]) -> str:
    """In one line."""
    if not ratios:
        return "too short to be measured: give more --megabytes"
    return f"{statistics.median(ratios):.3f} [{min(ratios):.3f} .. {max(ratios):.3f}]"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: the temporary folder)"
    )
    parser.add_argument(
        "--beside", type=int, metavar="RANKS", help="measure saves beside training on so many ranks"
    )
    parser.add_argument("--batch", type=int, default=64, help="of a step beside which is saved")
    args = parser.parse_args()
    if args.beside:
        with tempfile.TemporaryDirectory(dir=args.folder) as base:
            given = (args.megabytes, args.rounds, args.batch, Path(base))
            ranks.run(args.beside, beside, *given)
        return
    warnings.filterwarnings("ignore", module="torch.distributed.checkpoint")
    engine = engine_of(args.megabytes)
    tensors = tensors_of(engine)
    size = sum(value.nbytes for value in tensors.values()) / 1e6
    with tempfile.TemporaryDirectory(dir=args.folder) as base:
        times = measure(contenders(engine, tensors), args.rounds, Path(base))
    print(
        f"{size:.0f} MB, {args.rounds} rounds; MB/s, median (slowest to fastest), and CPU ms per GB"
    )
    for index, verb in enumerate(("save", "load")):
        for name, kept in times.items():
            rates = [size / wall for wall, _ in kept[index]]
            spread = f"({min(rates):.0f} to {max(rates):.0f})"
            cpu = statistics.median(cpu for _, cpu in kept[index]) * 1e6 / size
            print(f"{verb}  {name:12} {statistics.median(rates):6.0f} {spread:16} {cpu:5.0f}")


if __name__ == "__main__":
    main()
