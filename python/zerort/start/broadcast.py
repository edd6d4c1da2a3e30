"""Everyone starts from rank 0's values."""

from __future__ import annotations

import torch
from torch import nn

from zerort.memory import FlatModel
from zerort.mesh import Comm

__all__ = ["broadcast"]


def broadcast(comm: Comm, model: nn.Module, flat: FlatModel) -> None:
    """Everyone starts from rank 0's values; what is not planned travels one by one, once."""
    planned = {id(parameter) for parameter in flat.params}
    with torch.no_grad():
        for bucket in flat.buckets:
            comm.broadcast(bucket.values.tensor)
            bucket.take_writes()
        for tensor in (*(p for p in model.parameters() if id(p) not in planned), *model.buffers()):
            data = tensor.detach()
            piece = data if data.is_contiguous() else data.contiguous()
            comm.broadcast(piece)
            if piece is not data:
                data.copy_(piece)
