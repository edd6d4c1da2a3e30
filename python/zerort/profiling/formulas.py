"""Floating-point operations of what torch's own counter takes for none.

torch's registry comes first: a formula here is for an operation that the running torch has none
for, and versions differ. As in torch a multiply-accumulate is two operations, and what works on
elements alone (activations, norms, sums, an outer product) is none. Formulas see shapes.

Not here: products of sparse matrices, whose cost is not in their shapes, and custom operations,
which have `torch.utils.flop_counter.register_flop_formula`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from math import prod
from typing import Any

import torch

__all__ = ["missing"]

Shape = Sequence[int]
Formula = Callable[..., int]


def missing(registry: Container[Any]) -> dict[Any, Formula]:
    """Operation -> formula of those in the running torch that are not in `registry`."""
    aten = torch.ops.aten
    there = {getattr(aten, name): made for name, made in FORMULAS.items() if hasattr(aten, name)}
    return {operation: made for operation, made in there.items() if operation not in registry}


def _vector(matrix: Shape, *_: Any, **__: Any) -> int:
    """`mv(matrix, vector)` and `dot(vector, vector)`: one multiply-accumulate an element."""
    return 2 * prod(matrix)


def _added_vector(_into: Shape, matrix: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _added_batches(_into: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(left) * right[-1]


def _matrices(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(left) * right[-1]


def _groups(left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """`_grouped_mm`: whichever side is one matrix for all groups, the groups tile it."""
    rows, inner = left[-2:]
    groups = left[0] if len(left) == 3 and len(right) == 3 else 1
    return 2 * groups * rows * inner * right[-1]


def _bilinear(left: Shape, weight: Shape, right: Shape, *_: Any, **__: Any) -> int:
    """`nn.Bilinear`: x A y for each row and output, the product with A first."""
    rows, outputs = left[0], weight[0]
    return 2 * rows * (prod(weight) + outputs * right[-1])


def _recurrent_layer(steps: Shape, up: Shape, across: Shape, *_: Any, **__: Any) -> int:
    """`mkldnn_rnn_layer`, one layer in one direction: gates x (input + hidden) a step."""
    return 2 * prod(steps[:-1]) * (prod(up) + prod(across))


def _recurrent(steps: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    """`_cudnn_rnn` and `miopen_rnn`: all layers and directions; biases are vectors."""
    return 2 * prod(steps[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _twice(forward: Formula) -> Formula:
    """A backward that takes the forward's arguments: a product for each of a product's factors."""
    return lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def _attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and their product with the values; a causal mask is not taken off, as in torch."""
    *heads, rows, width = query
    return 2 * prod(heads) * rows * key[-2] * (width + value[-1])


def _attention_backward(_grad: Shape, *qkv: Any, **__: Any) -> int:
    """The scores once more, then a gradient for each factor of the two products: 5 for 2."""
    return 5 * _attention(*qkv) // 2


def _native_attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """`nn.MultiheadAttention` without gradients: four square projections around attention."""
    width = query[-1]
    projected = 2 * prod(query) + prod(key) + prod(value)
    return 2 * projected * width + _attention(query, key, value)


def _native_encoder_layer(source: Shape, *rest: Any, **__: Any) -> int:
    """`nn.TransformerEncoderLayer` without gradients: attention and two linear layers."""
    weights: int = prod(rest[_UP]) + prod(rest[_DOWN])
    return _native_attention(source, source, source) + 2 * prod(source[:-1]) * weights


_UP, _DOWN = 13, 15
"""Where `_transformer_encoder_layer_fwd` has the weights of the linear layers, after the source."""

FORMULAS: dict[str, Formula] = {
    "mv": _vector,
    "dot": _vector,
    "vdot": _vector,
    "addmv": _added_vector,
    "addbmm": _added_batches,
    "_int_mm": _matrices,
    "_grouped_mm": _groups,
    "_trilinear": _bilinear,
    "mkldnn_rnn_layer": _recurrent_layer,
    "mkldnn_rnn_layer_backward": _twice(_recurrent_layer),
    "_cudnn_rnn": _recurrent,
    "_cudnn_rnn_backward": _twice(_recurrent),
    "miopen_rnn": _recurrent,
    "miopen_rnn_backward": _twice(_recurrent),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _native_encoder_layer,
}
