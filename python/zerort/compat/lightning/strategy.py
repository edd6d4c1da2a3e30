"""The Trainer's strategy: Lightning's loop over an engine.

The loop, accumulation, schedulers and callbacks stay Lightning's; forward, backward, clipping, the
update and the model's part of a checkpoint are the engine's, which lives from `setup` to
`teardown`. Outside `fit` an engine of stage 3 only runs forward, on shards; below that there is
none, and the module itself is validated, whole on every rank.

Processes are started as `DDPStrategy` starts them, and the Trainer's own collectives stay on
torch.distributed's default group, which the engine never uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

import zerort
from zerort.compat.lightning.collectives import Collectives
from zerort.compat.lightning.metrics import Metrics
from zerort.compat.lightning.modules import Whole, forward_only, is_sharded
from zerort.compat.lightning.packages import fabric, pytorch
from zerort.compat.lightning.precision import FullPrecision, adapted
from zerort.compat.lightning.refusals import SEVERAL, only_optimizer, refuse_clipping
from zerort.compat.lightning.saving import Saving
from zerort.compat.lightning.settings import Given, completed, stage_of
from zerort.errors import ConfigError
from zerort.zero import Init

__all__ = ["ZerortStrategy"]

_DDPStrategy: Any = pytorch("strategies").DDPStrategy
_timeout = fabric("plugins.collectives.torch_collective").default_pg_timeout
_FITTING = pytorch("trainer.states").TrainerFn.FITTING
_sync_module_states = pytorch("overrides.distributed")._sync_module_states
_is_overridden = pytorch("utilities.model_helpers").is_overridden
_LightningModule = pytorch("core").LightningModule


class ZerortStrategy(Collectives, Saving, _DDPStrategy):  # type: ignore[misc]
    """`Trainer(strategy=ZerortStrategy(stage=2))`, or by its name, `"zerort_stage_2"`.

    `config` is a DeepSpeed configuration (a dict, a path or base64): what Lightning is told, which
    is precision, clipping and accumulation, is left out of it. The stage is `stage`, else the
    configuration's, else 2. With `load_full_weights` a checkpoint that is one file, such as DDP's,
    may be fitted on, without its optimizer's state. `keep_weights`: at stage 3 every rank has the
    whole model in host memory behind `fit`, `validate`, `test` and `predict`, as it has below; else
    its parameters stay in shards, for the next of these.
    `weights_only=False` lets `torch.load` make any object of Lightning's part of a checkpoint.
    The rest is `DDPStrategy`'s.

    Raises `ConfigError` for a configuration with a mistake, and in `fit` for what an engine cannot
    do: several optimizers, clipping by value.
    """

    strategy_name = "zerort"
    model: Any
    optimizers: Any

    def __init__(
        self,
        stage: int | None = None,
        config: Given = None,
        *,
        exclude_frozen_parameters: bool = False,
        load_full_weights: bool = False,
        keep_weights: bool = True,
        weights_only: bool | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = _timeout,
        start_method: str = "popen",
    ) -> None:
        self._data, self.zero = stage_of(config, stage)
        self._engine: zerort.Engine | None = None
        self._failed = False
        self._metrics: Metrics | None = None
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self.load_full_weights = load_full_weights
        self.keep_weights = keep_weights
        self.weights_only = weights_only
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )

    @property
    def engine(self) -> zerort.Engine:
        """Of the fit that is under way, or at stage 3 of the evaluation. Raises `ConfigError` where
        there is none.
        """
        if self._engine is None:
            raise ConfigError(
                "there is an engine only within fit, and at stage 3 within validate, test and "
                "predict: use the module itself"
            )
        return self._engine

    @property
    def precision_plugin(self) -> Any:
        """Lightning's, without its scaler and its clipping."""
        return self._precision_plugin if self._precision_plugin is not None else FullPrecision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        self._precision_plugin = adapted(plugin)

    # Setting up.

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Around `configure_model`: at stage 3 parameters are born in shards."""
        with Init(config_dict_or_path=self._settings()):  # below it does nothing
            yield

    def setup(self, trainer: Any) -> None:
        """Makes the engine, or outside `fit` below stage 3 puts the module in place."""
        self._failed = False
        self.accelerator.setup(trainer)
        if trainer.state.fn == _FITTING:
            refuse_clipping(trainer)
            if self._layer_sync:
                self.model = self._layer_sync.apply(self.model)
            if not is_sharded(self.model):
                self.model_to_device()
            self.setup_optimizers(trainer)
            self._open()
        elif self.zero.shards_parameters and any(True for _ in self.model.parameters()):
            if not is_sharded(self.model):
                self.model_to_device()
            self.model = self._engine = forward_only(self.model, self._settings())
        else:
            self.model = self.precision_plugin.convert_module(self.model)
            self.model_to_device()
            _sync_module_states(self.model)
        if self._engine is not None:
            self._engine.open_gate(self._timeout or _timeout)
            self._metrics = Metrics(self.lightning_module, self._together)
        self.setup_precision_plugin()
        if self._fits:
            self._meet_before_batches(trainer.fit_loop.epoch_loop)
            # in manual optimization it is how a window is dropped
            self._lightning_optimizers[0].zero_grad = self.engine.zero_grad

    def setup_optimizers(self, trainer: Any) -> None:
        """Raises `ConfigError` for several optimizers, which Lightning itself refuses where it
        steps.
        """
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" not in str(error):
                raise
            raise ConfigError(
                f"configure_optimizers returns several optimizers: {SEVERAL}"
            ) from error

    def _settings(self) -> dict[str, Any]:
        trainer = self.lightning_module.trainer
        clip = trainer.gradient_clip_val if self.lightning_module.automatic_optimization else None
        return completed(self._data, self.precision_plugin.precision, clip)

    def _open(self) -> None:
        settings = self._settings()
        optimizer = only_optimizer(self.optimizers, settings)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._engine, optimizer, _, _ = zerort.initialize(
            model=self.model,
            optimizer=optimizer,
            model_parameters=None if optimizer is not None else trainable,
            config=settings,
        )
        self.optimizers = [optimizer]
        self.precision_plugin.clipping = self._engine.gradient_clipping()
        self.model = self._engine

    # A step.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Through the engine; in manual optimization, whose backwards and steps lie within, the
        module's own calls are the forwards.
        """
        if self._engine is not None and not self.lightning_module.automatic_optimization:
            with self.precision_plugin.train_step_context():
                return self.lightning_module.training_step(*args, **kwargs)
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The engine's. A `LightningModule.backward` of the user's gets the scaled loss."""
        module, precision = self.lightning_module, self.precision_plugin
        if self._engine is None:
            return super().backward(closure_loss, optimizer, *args, **kwargs)  # type: ignore[no-any-return]
        loss = precision.pre_backward(closure_loss, module)
        plain = not args and kwargs.keys() <= {"retain_graph"}
        if plain and not _is_overridden("backward", module, _LightningModule):
            self._engine.backward(loss, retain_graph=bool(kwargs.get("retain_graph")))
        else:
            module.backward(self._engine.scale(loss), *args, **kwargs)
        done: Tensor = precision.post_backward(loss, module)
        return done

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """Runs the closure, then the engine's step.

        Raises `ConfigError` where `training_step` has returned None beside other ranks, which
        reduce.
        """
        if kwargs:
            raise ConfigError(
                f"optimizer.step({', '.join(kwargs)}=...): the engine steps, and takes nothing but "
                "the closure"
            )
        model = model or self.lightning_module
        result = closure()
        self.precision_plugin._after_closure(model, optimizer)
        if result is None and model.automatic_optimization:
            if self.world_size == 1:
                self.engine.zero_grad()
                return None
            raise ConfigError(
                "training_step returned None: the other ranks reduce gradients in this step, so "
                "none can leave it out; return a loss, zero times another where it is not to count"
            )
        self.engine.step()
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Within, backwards add up on this rank."""
        with self.engine.no_sync():
            yield

    # The end.

    def on_exception(self, exception: BaseException) -> None:
        """The peers hear of it where they wait next, and the engine is given back."""
        self._announce()
        super().on_exception(exception)
        if self._engine is not None:
            self._engine.destroy()

    def teardown(self) -> None:
        """Gives the engine back, and the module its weights."""
        module, engine = self.lightning_module, self._engine
        if self._metrics is not None and module is not None:
            self._metrics.give_back()
            self._leave_batches(module.trainer.fit_loop.epoch_loop)
        if engine is not None and module is not None:
            gathers = self.keep_weights and not self._failed and is_sharded(module)
            whole = Whole(module) if gathers else None
            engine.destroy()
            self._engine, self.model = None, module
            if whole is not None:
                whole.give_back(module)
        if module is not None and is_sharded(module):
            self._lightning_module = None  # shards stay where they are
        try:
            super().teardown()
        finally:
            self._lightning_module = module

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """The names `zerort_stage_0` to `zerort_stage_3`."""
        for stage in range(4):
            strategy_registry.register(
                f"zerort_stage_{stage}", cls, description=f"zerort, ZeRO stage {stage}", stage=stage
            )
