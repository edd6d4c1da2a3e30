"""DeepSpeed's getting-started loop, in which nothing but the import is changed.

    torchrun --nproc_per_node=2 examples/deepspeed_loop.py \\
             --deepspeed_config examples/deepspeed_loop.json

Where a program has to go on saying `import deepspeed`, it is started as
`torchrun --nproc_per_node=2 -m zerort.compat.run program.py`.

Nothing is downloaded: a small GPT learns the source of this Python's own standard library. A second
start with the same --save_dir goes on where the first has ended.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import zerort as deepspeed
from corpus import Corpus
from gpt import GPT, Shape, next_token_loss


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of the text one behind the other, and the same a byte further."""

    def __init__(self, text: Tensor, context: int, samples: int) -> None:
        self.text, self.context, self.samples = text, context, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context
        window = self.text[start : start + self.context + 1].long()
        return window[:-1], window[1:]


class Learner(nn.Module):
    """A model that returns its loss, as DeepSpeed's examples have it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gpt = GPT(shape)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return next_token_loss(self.gpt(inputs), targets)


def arguments() -> argparse.Namespace:
    """The program's own, and DeepSpeed's."""
    parser = argparse.ArgumentParser(description="DeepSpeed's getting-started loop.")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by a launcher")
    parser.add_argument("--steps", type=int, default=60, help="of this start")
    parser.add_argument("--save_interval", type=int, default=30, help="steps between checkpoints")
    parser.add_argument(
        "--save_dir", type=Path, default=Path("runs/deepspeed_loop"), help="checkpoints' folder"
    )
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    """Trains from where the last start has ended."""
    args = arguments()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    shape = Shape(context=64, width=64, depth=2)
    text = Corpus.load(None).train
    dataset = Windows(text, shape.context, samples=(len(text) - 1) // shape.context)
    net = Learner(shape)

    model_engine, _, trainloader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=net.parameters(), training_data=dataset
    )

    _, client_sd = model_engine.load_checkpoint(args.save_dir)
    first = (client_sd or {}).get("step", 0)

    for step, batch in enumerate(trainloader, start=first + 1):
        inputs, targets = (each.to(model_engine.device) for each in batch)
        loss = model_engine(inputs, targets)
        model_engine.backward(loss)
        model_engine.step()

        if model_engine.global_rank == 0 and (step - first == 1 or step % 10 == 0):
            print(f"step {step:4d}   loss {loss.item():.4f}", flush=True)
        last = step == first + args.steps
        if last or step % args.save_interval == 0:
            client_state = {"step": step}
            model_engine.save_checkpoint(args.save_dir, f"step{step}", client_state=client_state)
        if last:
            break

    model_engine.destroy()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
