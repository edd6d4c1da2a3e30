"""The Trainer's strategy: Lightning's loop over an engine.

The loop, accumulation, schedulers and callbacks stay Lightning's; forward, backward, clipping, the
update and the model's part of a checkpoint are the engine's, which lives from `setup` to
`teardown`. Outside `fit` an engine of stage 3 only runs forward, on shards; below that there is
none, and the module itself is validated, whole on every rank.

Processes are started as `DDPStrategy` starts them, and the Trainer's own collectives stay on
torch.distributed's default group, which the engine never uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

import zerort
from zerort.checkpoint import get_client_state, get_fp32_state_dict
from zerort.compat.lightning.collectives import Collectives
from zerort.compat.lightning.modules import (
    Whole,
    forward_only,
    is_sharded,
)
from zerort.compat.lightning.packages import fabric, pytorch
from zerort.compat.lightning.precision import FullPrecision, adapted
from zerort.compat.lightning.settings import Given, completed, stage_of
from zerort.compat.lightning.stored import TAG, folder_of, packed, refuse_place, unpacked
from zerort.errors import CheckpointError, ConfigError
from zerort.zero import Init

__all__ = ["ZerortStrategy"]

_DDPStrategy: Any = pytorch("strategies").DDPStrategy
_timeout = fabric("plugins.collectives.torch_collective").default_pg_timeout
_rank_zero = pytorch("utilities.rank_zero")
_FITTING = pytorch("trainer.states").TrainerFn.FITTING
_sync_module_states = pytorch("overrides.distributed")._sync_module_states
_is_overridden = pytorch("utilities.model_helpers").is_overridden
_LightningModule = pytorch("core").LightningModule
_MockOptimizer = pytorch("core.optimizer")._MockOptimizer


class ZerortStrategy(Collectives, _DDPStrategy):  # type: ignore[misc]
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
        self._full: Mapping[str, Any] | None = None
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
    def _fits(self) -> bool:
        return self._engine is not None and self._engine.optimizer is not None

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
            self._refuse(trainer)
            if self._layer_sync:
                self.model = self._layer_sync.apply(self.model)
            if not is_sharded(self.model):
                self.model_to_device()
            self.setup_optimizers(trainer)
            self._open(trainer)
        elif self.zero.shards_parameters and any(True for _ in self.model.parameters()):
            if not is_sharded(self.model):
                self.model_to_device()
            self.model = self._engine = forward_only(self.model, self._settings())
            self._engine.open_gate(self._timeout or _timeout)
        else:
            self.model = self.precision_plugin.convert_module(self.model)
            self.model_to_device()
            _sync_module_states(self.model)
        self.setup_precision_plugin()
        if self._fits:
            # in manual optimization it is how a window is dropped
            self._lightning_optimizers[0].zero_grad = self.engine.zero_grad

    def _settings(self) -> dict[str, Any]:
        trainer = self.lightning_module.trainer
        clip = trainer.gradient_clip_val if self.lightning_module.automatic_optimization else None
        return completed(self._data, self.precision_plugin.precision, clip)

    def _refuse(self, trainer: Any) -> None:
        if str(getattr(trainer.gradient_clip_algorithm, "value", None)) == "value":
            raise ConfigError(
                'gradient_clip_algorithm="value": gradients are in shards, and are clipped by '
                'their norm alone; leave it out, or give "norm"'
            )
        if _is_overridden("configure_gradient_clipping", self.lightning_module, _LightningModule):
            _rank_zero.rank_zero_warn(
                "configure_gradient_clipping is called, but gradients are in shards there: the "
                "engine clips in its step, to the Trainer's gradient_clip_val"
            )

    def _open(self, trainer: Any) -> None:
        settings = self._settings()
        optimizer = self._only_optimizer(settings)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self._engine, optimizer, _, _ = zerort.initialize(
            model=self.model,
            optimizer=optimizer,
            model_parameters=None if optimizer is not None else trainable,
            config=settings,
        )
        self._engine.open_gate(self._timeout or _timeout)
        self.optimizers = [optimizer]
        self.precision_plugin.clipping = self._engine.gradient_clipping()
        self.model = self._engine

    def _only_optimizer(self, settings: Mapping[str, Any]) -> Any:
        """The one of `configure_optimizers`; None where the configuration has one."""
        found = [each for each in self.optimizers if not isinstance(each, _MockOptimizer)]
        if "optimizer" in settings:
            if found:
                raise ConfigError(
                    "configure_optimizers returns an optimizer, and the configuration has one: "
                    "give one"
                )
            return None
        if len(found) != 1:
            raise ConfigError(
                f"configure_optimizers returns {len(found)} optimizers, and an engine has one: put "
                "the parameters into groups of one optimizer, or use another strategy"
            )
        if isinstance(found[0], torch.optim.LBFGS):
            raise ConfigError(
                "configure_optimizers returns LBFGS, which calls its closure several times a step: "
                "use another strategy"
            )
        return found[0]

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

    # Checkpoints.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The engine loads."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The engine has done it."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing within `fit`: the engine writes the weights."""
        return {} if self._engine is not None else dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing: the engine writes it."""
        return {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing: the engine has read it."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """All ranks: within `fit` a folder, which holds everything; behind it one file of
        Lightning's format, which holds no optimizer's state.
        """
        if storage_options is not None:
            raise ConfigError(
                "save_checkpoint(storage_options=...): the engine writes; leave it out"
            )
        refuse_place(filepath)
        filepath = self.broadcast(str(filepath))
        if self._engine is None:
            _rank_zero.rank_zero_warn(
                f"{filepath}: the engine has been given back, so there is no optimizer's state in "
                "this checkpoint: save within fit, for example by "
                "ModelCheckpoint(save_last=True), to resume from it"
            )
            super().save_checkpoint(checkpoint, filepath)
            return
        kept = {k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")}
        client_state = packed(kept, self.broadcast)
        self._engine.save_checkpoint(
            filepath,
            tag=TAG,
            client_state=client_state,
            exclude_frozen_parameters=self.exclude_frozen_parameters,
            overwrite=True,
        )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads what the engine keeps; returns Lightning's dictionary."""
        weights_only = self.weights_only if weights_only is None else weights_only
        checkpoint_path = self.broadcast(str(checkpoint_path))
        folder = folder_of(checkpoint_path)
        if folder is None:
            return self._load_file(checkpoint_path, weights_only)
        strict = self.lightning_module.strict_loading
        if self._engine is None:
            weights = get_fp32_state_dict(folder, TAG)
            self.lightning_module.load_state_dict(weights, strict=strict)
            client_state = get_client_state(folder, TAG)
        else:
            _, client_state = self._engine.load_checkpoint(
                folder, tag=TAG, load_module_strict=strict
            )
        return {"state_dict": {}, **unpacked(client_state, folder, weights_only)}

    def _load_file(self, path: str, weights_only: bool | None) -> dict[str, Any]:
        if self._fits and not self.load_full_weights:
            raise CheckpointError(
                f"{path} is one file, which holds no state of this strategy's optimizer: give "
                "ZerortStrategy(load_full_weights=True) to fit on from its weights"
            )
        if self._fits:
            _rank_zero.rank_zero_warn(f"{path}: the optimizer begins anew, weights alone are taken")
        self._full = super().load_checkpoint(path, weights_only)
        return dict(self._full)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """What one file holds; a folder's weights are there already."""
        full, self._full = self._full, None
        if full is None:
            return
        if self._engine is None:
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)
        else:
            self._engine.load_module_state_dict(checkpoint["state_dict"], strict=strict)

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
