"""Saves and loads in MB/s, next to torch.save, safetensors and torch's distributed checkpoint, in
one interleaved run.

    python benches/py/checkpoint.py [--megabytes 256] [--rounds 7] [--folder DIR]

All hold the same tensors: fp32 weights and AdamW's two moments of one process. All sync their files
and the folder, so that a save that returned survives a power loss; only zerort also hashes, writes
a manifest and renames. Loads find the files in the page cache; zerort's verifies what it reads.
Medians, with the fastest and the slowest round, and the CPU time, which a busy machine changes
less.

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
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import zerort

Times = list[tuple[float, float]]
Contender = tuple[Callable[[Path], Any], Callable[[Path], Any]]


def engine_of(megabytes: int) -> Any:
    """An engine that has stepped once, whose weights and moments have about so many megabytes."""
    width = 1024
    layers = max(1, round(megabytes * 1e6 / 12 / (width * width)))
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    engine, *_ = zerort.initialize(
        model=model,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 1},
        },
    )
    engine.backward(engine(torch.randn(1, width)).square().mean())
    engine.step()
    return engine


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
    args = parser.parse_args()
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
