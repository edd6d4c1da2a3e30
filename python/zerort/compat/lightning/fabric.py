"""Fabric's strategy: a loop of one's own over an engine.

`fabric.setup(model, optimizer)` makes the engine, `fabric.backward`, `optimizer.step()`,
`optimizer.zero_grad()` and `fabric.no_backward_sync` are the engine's, and `fabric.save` and
`fabric.load` its checkpoints. A model that is set up without an optimizer is for inference, at
stage 3 in shards, behind an engine that only runs forward, until `fabric.setup_optimizers`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import zerort
from zerort.checkpoint import get_client_state, get_fp32_state_dict
from zerort.compat.lightning.modules import SetUp, forward_only, is_sharded
from zerort.compat.lightning.packages import fabric, pytorch
from zerort.compat.lightning.precision import FabricFullPrecision, adapted_of_fabric, cast
from zerort.compat.lightning.refusals import SEVERAL
from zerort.compat.lightning.settings import Given, completed, stage_of
from zerort.compat.lightning.stored import TAG, folder_of, packed, refuse_place, unpacked
from zerort.errors import CheckpointError, ConfigError
from zerort.zero import Init

__all__ = ["ZerortFabricStrategy"]

_DDPStrategy: Any = fabric("strategies").DDPStrategy
_BackwardSyncControl: Any = fabric("strategies.strategy")._BackwardSyncControl
_timeout = fabric("plugins.collectives.torch_collective").default_pg_timeout
_sync_module_states = pytorch("overrides.distributed")._sync_module_states
_TAKES_SCHEDULER = (
    "scheduler" in inspect.signature(_DDPStrategy.setup_module_and_optimizers).parameters
)


class _Holding(_BackwardSyncControl):  # type: ignore[misc]
    """`fabric.no_backward_sync`."""

    def no_backward_sync(
        self, module: nn.Module, enabled: bool = True
    ) -> AbstractContextManager[Any]:
        """Within, backwards add up on this rank."""
        if not enabled:
            return nullcontext()
        engine = _engine_behind(module)
        if engine is None or engine.optimizer is None:
            raise ConfigError(
                "no_backward_sync of a model without an engine: set it up with its optimizer, "
                "fabric.setup(model, optimizer)"
            )
        return engine.no_sync()


class ZerortFabricStrategy(_DDPStrategy):  # type: ignore[misc]
    """`Fabric(strategy=ZerortFabricStrategy(stage=2))`, or by its name, `"zerort_stage_2"`.

    `config` is a DeepSpeed configuration (a dict, a path or base64) without what Fabric is told,
    its precision; "gradient_clipping" belongs into it, and is 0 where it is left out. The stage is
    `stage`, else the configuration's, else 2. The rest is as in `ZerortStrategy`.

    Raises `ConfigError` for a configuration with a mistake, and in `setup` for several optimizers.
    """

    def __init__(
        self,
        stage: int | None = None,
        config: Given = None,
        *,
        exclude_frozen_parameters: bool = False,
        weights_only: bool | None = None,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = _timeout,
        start_method: str = "popen",
    ) -> None:
        self._data, self.zero = stage_of(config, stage)
        self._engines: weakref.WeakSet[zerort.Engine] = weakref.WeakSet()
        """Of models that are in use, and train."""
        self._alone: weakref.WeakSet[SetUp] = weakref.WeakSet()
        """What has been set up without an optimizer."""
        self.exclude_frozen_parameters = exclude_frozen_parameters
        self.weights_only = weights_only
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision=precision,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
        )
        self._backward_sync_control = _Holding()

    @property
    def precision(self) -> Any:
        """Fabric's plugin, without its scaler."""
        return self._precision if self._precision is not None else FabricFullPrecision()

    @precision.setter
    def precision(self, plugin: Any) -> None:
        self._precision = adapted_of_fabric(plugin)

    # Setting up.

    def module_to_device(self, module: nn.Module) -> None:
        """Moves it, unless it was born in shards, which are where they belong."""
        if not is_sharded(module):
            super().module_to_device(module)

    def module_init_context(self, empty_init: bool | None = None) -> AbstractContextManager[Any]:
        """`fabric.init_module()`: at stage 3 parameters are born in shards."""
        if not self.zero.shards_parameters:
            return super().module_init_context(empty_init=empty_init)  # type: ignore[no-any-return]
        stack = ExitStack()
        stack.enter_context(self.precision.module_init_context())
        stack.enter_context(Init(config_dict_or_path=self._settings()))
        return stack

    def _settings(self) -> dict[str, Any]:
        return completed(self._data, self.precision.precision, None)

    def setup_module_and_optimizers(
        self, module: nn.Module, optimizers: list[Any], scheduler: Any = None
    ) -> tuple[Any, ...]:
        """An engine over the module and its one optimizer; the scheduler stays the caller's."""
        if len(optimizers) != 1:
            raise ConfigError(f"fabric.setup got {len(optimizers)} optimizers, and {SEVERAL}")
        engine, optimizer = self._open(module, optimizers[0])
        found = (engine, [optimizer])
        return (*found, scheduler) if _TAKES_SCHEDULER else found

    def _open(self, module: nn.Module, optimizer: Any) -> tuple[zerort.Engine, Any]:
        engine, optimizer, _, _ = zerort.initialize(
            model=module, optimizer=optimizer, config=self._settings()
        )
        self._engines.add(engine)
        _drop_through(engine, optimizer)
        return engine, optimizer

    def setup_module(self, module: nn.Module) -> nn.Module:
        """With rank 0's values: in shards at stage 3, else whole on every rank."""
        engine = None
        if self.zero.shards_parameters and any(True for _ in module.parameters()):
            engine = forward_only(module, self._settings())
        else:
            module = cast(self.precision, module)
            if any(True for _ in (*module.parameters(), *module.buffers())):
                _sync_module_states(module)
        alone = SetUp(module, engine)
        self._alone.add(alone)
        return alone

    def setup_optimizer(self, optimizer: Any) -> Any:
        """For a model that has been set up: from here on it trains. Raises `ConfigError` where
        there is none, or it has an optimizer.
        """
        owner = next((each for each in self._alone if each.owns(optimizer)), None)
        if owner is None or owner.trains:
            raise ConfigError(
                "fabric.setup_optimizers: the parameters are of no model that has been set up and "
                "has no optimizer yet: fabric.setup_module(model) first, or "
                "fabric.setup(model, optimizer)"
            )
        if owner.engine is not None:
            owner.engine.destroy()  # the shards stay for the next one
        engine, optimizer = self._open(owner.module, optimizer)
        owner.hand_to(engine)
        return optimizer

    # A step.

    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """The engine's; `module` says whose, where there are several."""
        if module is None and len(self._engines) > 1:
            raise ConfigError(
                f"fabric.backward(loss) with {len(self._engines)} models set up: say whose loss it "
                "is, fabric.backward(loss, model=model)"
            )
        only = next(iter(self._engines), None)
        engine = only if module is None else _engine_behind(module)
        if engine is None:
            super().backward(tensor, module, *args, **kwargs)
        elif args or kwargs.keys() - {"retain_graph"}:
            engine.scale(tensor).backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        else:
            engine.backward(tensor, retain_graph=bool(kwargs.get("retain_graph")))

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Runs the closure, if there is one, then the step of the optimizer's engine."""
        closure = kwargs.pop("closure", None)
        if kwargs:
            raise ConfigError(
                f"optimizer.step({', '.join(kwargs)}=...): the engine steps, and takes nothing but "
                "the closure"
            )
        engine = self._engine_of(optimizer)
        result = None if closure is None else closure()
        engine.step()
        return result

    def _engine_of(self, optimizer: Any) -> zerort.Engine:
        for engine in self._engines:
            if engine.optimizer is optimizer:
                return engine
        raise ConfigError(
            "this optimizer belongs to no engine: set it up together with its model, "
            "fabric.setup(model, optimizer)"
        )

    def clip_gradients_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `ConfigError`: gradients are in shards."""
        raise ConfigError(
            'fabric.clip_gradients: the engine clips in its step; give "gradient_clipping" in the '
            "strategy's configuration and leave the call out"
        )

    clip_gradients_value = clip_gradients_norm

    # Checkpoints.

    def get_module_state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The module's own."""
        found = module.module if isinstance(module, zerort.Engine | SetUp) else module
        return dict(found.state_dict())

    def load_module_state_dict(
        self, module: nn.Module, state_dict: dict[str, Any], strict: bool = True
    ) -> None:
        """Into the module, and its masters."""
        engine = _engine_behind(module)
        if engine is not None:
            engine.load_module_state_dict(state_dict, strict=strict)
        else:
            found = module.module if isinstance(module, SetUp) else module
            found.load_state_dict(state_dict, strict=strict)

    def save_checkpoint(
        self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: Any = None
    ) -> None:
        """A folder with the engine of `state`, and everything else that is in it."""
        refuse_place(path)
        state = _unwrapped(state)
        engine = _only_engine(state)
        if engine is None:
            super().save_checkpoint(path, state, storage_options=storage_options, filter=filter)
            return
        if storage_options is not None or filter:
            raise ConfigError(
                "fabric.save(storage_options=..., filter=...): the engine writes; leave them out. "
                "Frozen weights stay out with the strategy's exclude_frozen_parameters=True"
            )
        rest = {name: value for name, value in state.items() if not _is_part(value, engine)}
        rest = self._convert_stateful_objects_in_state(rest, filter={})
        engine.save_checkpoint(
            self.broadcast(str(path)),
            tag=TAG,
            client_state=packed(rest, self.broadcast),
            exclude_frozen_parameters=self.exclude_frozen_parameters,
            overwrite=True,
        )

    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Into the engine and the objects of `state`; returns what is left."""
        path = self.broadcast(str(path))
        folder = folder_of(path)
        given, state = state, _unwrapped(state) if isinstance(state, Mapping) else state
        if folder is None:
            return dict(super().load_checkpoint(path, given, strict))
        model = _only_model(state) if isinstance(state, Mapping) else None
        if model is None:
            raise CheckpointError(
                f"{folder} is an engine's checkpoint: give its model in the state, "
                'fabric.load(path, {"model": model})'
            )
        client_state = _loaded(model, folder, state, strict)
        weights_only = self.weights_only if weights_only is None else weights_only
        found = unpacked(client_state, folder, weights_only)
        wanted = [name for name, value in state.items() if not _is_part(value, model)]
        missing = [name for name in wanted if name not in found]
        if missing and strict:
            raise CheckpointError(
                f"{folder} has no {', '.join(missing)}, only {', '.join(found) or 'the engine'}: "
                "leave it out of the state, or give strict=False"
            )
        for name in wanted:
            if name in found:
                _give(given, name, found.pop(name))
        return found

    def teardown(self) -> None:
        """Gives the engines back."""
        for engine in (*self._engines, *(each.engine for each in self._alone)):
            if engine is not None:
                engine.destroy()
        self._engines.clear()
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """The names `zerort_stage_0` to `zerort_stage_3`."""
        for stage in range(4):
            strategy_registry.register(
                f"zerort_stage_{stage}", cls, description=f"zerort, ZeRO stage {stage}", stage=stage
            )


def _drop_through(engine: zerort.Engine, optimizer: Any) -> None:
    """`optimizer.zero_grad()` drops the window. Fabric's wrapper has the methods of the optimizer's
    class, so the class has to have it.
    """
    kind, found = type(optimizer), weakref.ref(engine)

    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        if (alive := found()) is not None:
            alive.zero_grad()

    body = {"zero_grad": zero_grad, "__module__": kind.__module__, "__doc__": kind.__doc__}
    optimizer.__class__ = type(kind.__name__, (kind,), body)


def _only_engine(state: Mapping[str, Any]) -> zerort.Engine | None:
    found = {id(each): each for each in state.values() if isinstance(each, zerort.Engine)}
    if len(found) > 1:
        raise ConfigError(
            f"a checkpoint holds one engine, and the state has {len(found)}: use a path for each"
        )
    return next(iter(found.values()), None)


def _only_model(state: Mapping[str, Any]) -> nn.Module | None:
    """The engine, or a module that was set up without one."""
    modules = {id(each): each for each in state.values() if isinstance(each, nn.Module)}
    only = next(iter(modules.values())) if len(modules) == 1 else None
    return _only_engine(state) or only


def _loaded(model: nn.Module, folder: Path, state: Mapping[str, Any], strict: bool) -> Any:
    """Loads `model`, with its optimizer where `state` has it; returns the client state."""
    if not isinstance(model, zerort.Engine):
        model.load_state_dict(get_fp32_state_dict(folder, TAG), strict=strict)
        return get_client_state(folder, TAG)
    optimizer = model.optimizer
    has_optimizer = any(value is optimizer is not None for value in state.values())
    return model.load_checkpoint(
        folder, tag=TAG, load_module_strict=strict, load_optimizer_states=has_optimizer
    )[1]


def _is_part(value: Any, model: nn.Module) -> bool:
    optimizer = model.optimizer if isinstance(model, zerort.Engine) else None
    return value is model or (value is not None and value is optimizer)


def _engine_behind(module: Any) -> zerort.Engine | None:
    if isinstance(module, SetUp):
        return module.engine
    return module if isinstance(module, zerort.Engine) else None


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Any]:
    """With the engine in the place of what was set up alone, or the module where there is none."""
    return {
        name: (value.engine or value.module) if isinstance(value, SetUp) else value
        for name, value in state.items()
    }


def _give(state: Any, name: str, value: Any) -> None:
    if hasattr(state[name], "load_state_dict"):
        state[name].load_state_dict(value)
    else:
        state[name] = value
