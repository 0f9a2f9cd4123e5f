"""``deepspeed.profiling.flops_profiler``: what a module computes, counted by the engine's profiler (hpc_ds/engine/flops.py)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpc_ds.compat.logs import show
from hpc_ds.config.sections import FlopsProfilerConfig
from hpc_ds.engine.flops import counting, render
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from hpc_ds.engine.flops import ModuleProfile

_SIZES = {"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}


class FlopsProfiler:
    """Counts what runs between ``start_profile`` and ``stop_profile``.

    Args:
        model: the module.
        ds_engine: accepted.
        recompute_fwd_factor: forwards repeated in backward, 1.0 for all of it.
    """

    def __init__(self, model: nn.Module, ds_engine: Any = None, recompute_fwd_factor: float = 0.0) -> None:  # noqa: ARG002
        self.model, self.recompute_fwd_factor = model, recompute_fwd_factor
        self._inside = contextlib.ExitStack()
        self._modules: list[ModuleProfile] = []

    def start_profile(self, ignore_list: Any = None) -> None:  # noqa: ARG002 - every module is counted
        """Begin to count."""
        self._modules = self._inside.enter_context(counting(self.model))

    def stop_profile(self) -> None:
        """End counting."""
        self._inside.close()

    def reset_profile(self) -> None:
        """Forget what was counted."""
        self._modules = []

    def end_profile(self) -> None:
        """End counting, and forget."""
        self.stop_profile()
        self.reset_profile()

    def get_total_flops(self, as_string: bool = False) -> Any:
        """Floating-point operations."""
        return flops_to_string(self._whole.flops) if as_string else self._whole.flops

    def get_total_macs(self, as_string: bool = False) -> Any:
        """Multiply-accumulates."""
        return macs_to_string(self._whole.macs) if as_string else self._whole.macs

    def get_total_params(self, as_string: bool = False) -> Any:
        """Parameters, in elements."""
        return params_to_string(self._whole.parameters) if as_string else self._whole.parameters

    def get_total_duration(self, as_string: bool = False) -> Any:
        """Seconds."""
        return duration_to_string(self._whole.seconds) if as_string else self._whole.seconds

    def print_model_profile(
        self,
        profile_step: int = 1,
        module_depth: int = -1,
        top_modules: int = 1,
        detailed: bool = True,
        output_file: str | None = None,
    ) -> None:
        """Print what was counted, or write it to a file."""
        self.stop_profile()
        config = FlopsProfilerConfig(
            recompute_fwd_factor=self.recompute_fwd_factor,
            module_depth=module_depth,
            top_modules=top_modules,
            detailed=detailed,
        )
        text = render([self._whole, *self._modules[1:]], config, profile_step)
        if output_file is None:
            show(text)
        else:
            Path(output_file).write_text(f"{text}\n", encoding="utf-8")

    @property
    def _whole(self) -> ModuleProfile:
        self.stop_profile()
        if not self._modules:
            raise ConfigError("FlopsProfiler: nothing is counted; call start_profile(), and the module after it")
        return self._modules[0]


def get_model_profile(  # noqa: PLR0913 - DeepSpeed's signature
    model: nn.Module,
    input_shape: tuple[int, ...] | None = None,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    print_profile: bool = True,
    detailed: bool = True,
    module_depth: int = -1,
    top_modules: int = 1,
    warm_up: int = 1,
    as_string: bool = True,
    output_file: str | None = None,
    ignore_modules: Any = None,
    mode: str = "forward",
) -> tuple[Any, Any, Any]:
    """Run a module, and count: floating-point operations, multiply-accumulates, parameters.

    Args:
        model: the module; it is in evaluation mode afterwards.
        input_shape: of the one tensor that it is called with, instead of ``args``.
        args: what it is called with.
        kwargs: what it is called with by name.
        print_profile: print it module by module.
        detailed: a line for each module.
        module_depth: depth that is printed; -1: the deepest.
        top_modules: modules named at each depth.
        warm_up: runs before the one that counts.
        as_string: return text such as "1.2 G".
        output_file: write it there instead of printing.
        ignore_modules: accepted; every module is counted.
        mode: ``forward`` or ``generate``.

    Raises:
        ConfigError: there is nothing to call it with, or no such mode.
    """
    if mode not in {"forward", "generate"}:
        raise ConfigError(f"mode {mode!r}: not a way to run a module; use 'forward' or 'generate'")
    if input_shape is not None:
        first = next(model.parameters(), torch.empty(()))
        args = [torch.zeros(input_shape, dtype=first.dtype, device=first.device)]
    if not args and not kwargs:
        raise ConfigError("get_model_profile: nothing to call the module with; give input_shape, args or kwargs")
    model.eval()
    call: Any = model if mode == "forward" else model.generate
    for _ in range(warm_up):
        call(*args, **(kwargs or {}))
    profiler = FlopsProfiler(model)
    profiler.start_profile(ignore_modules)
    call(*args, **(kwargs or {}))
    if print_profile:
        profiler.print_model_profile(warm_up, module_depth, top_modules, detailed, output_file)
    counted = profiler.get_total_flops(), profiler.get_total_macs(), profiler.get_total_params()
    if not as_string:
        return counted
    return number_to_string(counted[0]), macs_to_string(counted[1]), params_to_string(counted[2])


def number_to_string(num: float, units: str | None = None, precision: int = 2) -> str:
    """12345678 as ``12.35 M``; or in the units given: T, G, M, K, m or u."""
    if units is None:
        units = next((unit for unit, size in _SIZES.items() if num >= size), "u" if num else "")
    return f"{round(num / _SIZES.get(units, 1.0), precision):g} {units}"


def flops_to_string(flops: float, units: str | None = None, precision: int = 2) -> str:
    """See ``number_to_string``."""
    return f"{number_to_string(flops, units, precision)}FLOPS"


def macs_to_string(macs: float, units: str | None = None, precision: int = 2) -> str:
    """See ``number_to_string``."""
    return f"{number_to_string(macs, units, precision)}MACs"


def bytes_to_string(b: float, units: str | None = None, precision: int = 2) -> str:
    """See ``number_to_string``."""
    return f"{number_to_string(b, units, precision)}B"


def duration_to_string(duration: float, units: str | None = None, precision: int = 2) -> str:
    """Seconds; see ``number_to_string``."""
    return f"{number_to_string(duration, units, precision)}s"


def params_to_string(params_num: float, units: str | None = None, precision: int = 2) -> str:
    """See ``number_to_string``; 1e9 is a B."""
    asked = units.replace("B", "G") if units else units
    return number_to_string(params_num, asked, precision).replace("G", "B").strip()
