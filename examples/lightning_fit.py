"""Lightning's Trainer on zerort: a small GPT learns the source of this Python's standard library.

    python examples/lightning_fit.py                            two ranks on the CPU of this machine
    torchrun --nproc_per_node=2 examples/lightning_fit.py            the same, started by torchrun
    python examples/lightning_fit.py --accelerator gpu --devices 8 --precision bf16-true

Nothing is downloaded. What is zerort's are two lines: the import, which registers the strategies'
names, and the name. A second start with --resume goes on from the last checkpoint to the bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import zerort.compat.lightning  # noqa: F401 (registers zerort_stage_0 to zerort_stage_3)
from corpus import Corpus
from gpt import GPT, Shape, next_token_loss

CONTEXT, BATCH = 64, 8


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of a text one behind the other, and the same a byte further."""

    def __init__(self, text: Tensor, samples: int) -> None:
        self.text, self.samples = text, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * CONTEXT
        window = self.text[start : start + CONTEXT + 1].long()
        return window[:-1], window[1:]


class Learner(pl.LightningModule):
    """A LightningModule as any other."""

    def __init__(self, width: int = 64, rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gpt: GPT | None = None

    def configure_model(self) -> None:
        """At stage 3 what is made here is born in shards."""
        if self.gpt is None:
            self.gpt = GPT(Shape(context=CONTEXT, width=self.hparams.width, depth=2))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = next_token_loss(self.gpt(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        loss = next_token_loss(self.gpt(batch[0]), batch[1])
        self.log("held_out", loss, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def arguments() -> argparse.Namespace:
    """The Trainer's arguments that one may want to change."""
    parser = argparse.ArgumentParser(description="Fit a byte-level GPT with Lightning on zerort.")
    parser.add_argument("--strategy", default="zerort_stage_2", help="or ddp, to compare")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=512, help="of an epoch, over all ranks")
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning_fit"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return parser.parse_args()


def main() -> None:
    """Fits, and validates what the best checkpoint holds."""
    args = arguments()
    pl.seed_everything(0, verbose=False)
    corpus = Corpus.load(None)
    train = DataLoader(Windows(corpus.train, args.samples), batch_size=BATCH)
    held_out = DataLoader(Windows(corpus.validation, args.samples // 8), batch_size=BATCH)
    saves = ModelCheckpoint(dirpath=args.folder, monitor="held_out", save_last=True)
    trainer = pl.Trainer(
        strategy=args.strategy,
        accelerator=args.accelerator,
        devices=args.devices,
        precision=args.precision,
        max_epochs=args.epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    learner = Learner()
    last = args.folder / "last.ckpt"
    trainer.fit(learner, train, held_out, ckpt_path=last if args.resume else None)
    (best,) = trainer.validate(learner, held_out, ckpt_path="best", verbose=False)
    if trainer.is_global_zero:
        print(f"{trainer.global_step} steps, {best['held_out'] / 0.6931:.4f} bits a byte")


if __name__ == "__main__":
    main()
