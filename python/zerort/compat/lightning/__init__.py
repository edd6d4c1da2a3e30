"""Lightning's Trainer and Fabric on zerort's engine.

    import zerort.compat.lightning
    trainer = Trainer(strategy="zerort_stage_2", accelerator="cpu", devices=2)

The import registers the names `zerort_stage_0` to `zerort_stage_3`. It takes whichever of
Lightning's packages the program has imported (`packages`). Nothing else in zerort imports it.
"""

from zerort.compat.lightning.fabric import ZerortFabricStrategy
from zerort.compat.lightning.packages import fabric as of_fabric
from zerort.compat.lightning.packages import pytorch
from zerort.compat.lightning.strategy import ZerortStrategy

__all__ = ["ZerortFabricStrategy", "ZerortStrategy"]

ZerortStrategy.register_strategies(pytorch("strategies").StrategyRegistry)
ZerortFabricStrategy.register_strategies(of_fabric("strategies").STRATEGY_REGISTRY)
