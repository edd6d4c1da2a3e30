"""GPUs as torch names them, for who looks at a machine and runs nothing on it."""

from __future__ import annotations

import torch

__all__ = ["GPU", "gpus"]

GPU = "cuda"
"""Their kind, before the number of one."""
gpus = torch.cuda
"""What torch knows of them."""
