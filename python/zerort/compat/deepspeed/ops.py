"""`deepspeed.ops`: which kernels there are, by the names of DeepSpeed's builders.

Nothing is built here. A builder says its name and whether zerort has the operation; to load it
raises `NotBuiltError`.
"""

from __future__ import annotations

from typing import Any

from zerort.compat.deepspeed.placeholder import placeholder

__all__ = ["BUILDERS", "COMPATIBLE"]

_BUILDERS = {
    "AsyncIOBuilder": "async_io",
    "CPUAdagradBuilder": "cpu_adagrad",
    "CPUAdamBuilder": "cpu_adam",
    "CPULionBuilder": "cpu_lion",
    "EvoformerAttnBuilder": "evoformer_attn",
    "FPQuantizerBuilder": "fp_quantizer",
    "FusedAdamBuilder": "fused_adam",
    "FusedLambBuilder": "fused_lamb",
    "FusedLionBuilder": "fused_lion",
    "GDSBuilder": "gds",
    "InferenceBuilder": "transformer_inference",
    "InferenceCoreBuilder": "inference_core_ops",
    "InferenceCutlassBuilder": "cutlass_ops",
    "QuantizerBuilder": "quantizer",
    "RaggedOpsBuilder": "ragged_device_ops",
    "RaggedUtilsBuilder": "ragged_ops",
    "RandomLTDBuilder": "random_ltd",
    "SparseAttnBuilder": "sparse_attn",
    "SpatialInferenceBuilder": "spatial_inference",
    "StochasticTransformerBuilder": "stochastic_transformer",
    "TransformerBuilder": "transformer",
    "UtilsBuilder": "utils",
}

_HERE = frozenset({"cpu_adagrad", "cpu_adam", "cpu_lion", "fused_adam", "fused_lion"})
"""The optimizers, over torch's kernels and zerort's own."""

COMPATIBLE = {name: name in _HERE for name in _BUILDERS.values()}
"""What `deepspeed.ops.__compatible_ops__` says: name of an operation -> whether it is here."""


class _Builder:
    """Of one operation."""

    NAME: str
    _dotted: str

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether zerort has the operation."""
        return COMPATIBLE[self.NAME]

    def load(self, verbose: bool = True) -> Any:
        """Raises `NotBuiltError`: there is no extension module."""
        return placeholder(f"{self._dotted}.load")()


def _builder(kind: str, name: str) -> type[_Builder]:
    where = "deepspeed.ops.op_builder"
    return type(
        kind, (_Builder,), {"NAME": name, "_dotted": f"{where}.{kind}", "__module__": where}
    )


BUILDERS = {kind: _builder(kind, name) for kind, name in _BUILDERS.items()}
"""The names of `deepspeed.ops.op_builder`."""
