"""``flops_profiler``: what one forward computes, module by module: parameters, multiply-accumulates, time.

Counted are matrix products, convolutions and attention, by torch's formulas; a multiply-accumulate (MAC) is two
floating-point operations (FLOPs). A backward computes twice what its forward does, and the recomputed share again.
While it is counted a forward runs without torch.compile, and on CUDA the host waits for each module: the times are for
comparing modules, not for speed.

Source: https://www.deepspeed.ai/tutorials/flops-profiler; Narayanan et al., Efficient Large-Scale Language Model
Training on GPU Clusters, 2021, appendix (backward = 2 x forward).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from hpc_ds.config.sections import FlopsProfilerConfig


log = logging.getLogger("hpc_ds")


@dataclass(slots=True)
class ModuleProfile:
    """One module in the forward that was counted, with all that is inside of it.

    Attributes:
        name: as in ``named_modules``; empty for the whole module.
        kind: name of its class.
        depth: 0 for the whole module.
        parameters: elements of the whole parameters, however they are sharded; a tied one counts once.
        flops: floating-point operations, over all calls.
        seconds: over all calls.
    """

    name: str
    kind: str
    depth: int
    parameters: int
    flops: int = 0
    seconds: float = 0.0

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.flops // 2


class FlopsProfiler:
    """Counts the first forward after ``profile_step`` steps, on rank 0.

    Attributes:
        modules: the profile in the order of ``named_modules``; empty until it is made.
    """

    def __init__(self, config: FlopsProfilerConfig, module: nn.Module, rank: int = 0) -> None:
        self.modules: list[ModuleProfile] = []
        self._config = config
        self._module = module
        self._step = config.profile_step if config.enabled and rank == 0 else None
        if self._step is not None and config.output_file is not None and not Path(config.output_file).parent.is_dir():
            raise ConfigError(
                f"flops_profiler.output_file {config.output_file!r}: its folder does not exist; make it, or name another file",
                key="flops_profiler.output_file",
                value=config.output_file,
            )

    @contextmanager
    def around_forward(self, step: int) -> Iterator[None]:
        """Count the forward inside, if its time has come, and write the profile.

        Args:
            step: steps taken so far, as the engine's ``global_steps``.
        """
        if step != self._step:
            yield
            return
        self._step = None  # the other micro-batches of the step are alike
        with counting(self._module) as modules:
            yield
        self.modules = modules
        text = render(modules, self._config, step)
        if self._config.output_file is None:
            log.info("%s", text)
        else:
            Path(self._config.output_file).write_text(text + "\n", encoding="utf-8")


@contextmanager
def counting(module: nn.Module) -> Iterator[list[ModuleProfile]]:
    """Count a forward; the list is complete once the context is left."""
    profiles: list[ModuleProfile] = []
    of_module: dict[nn.Module, ModuleProfile] = {}
    hooks = []
    aten = torch.ops.aten
    # torch has a formula for the fused attention of CUDA only
    on_cpu = {aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}  # noqa: SLF001 - operators have such names
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        try:
            for name, inner in module.named_modules():
                depth = name.count(".") + 1 if name else 0
                profile = of_module[inner] = ModuleProfile(name, type(inner).__name__, depth, 0)
                profiles.append(profile)
                before, after = _hooks(profile, counter.get_total_flops)
                # before the hooks that gather sharded parameters, and after those that drop them
                hooks.append(inner.register_forward_pre_hook(before, prepend=True))
                hooks.append(inner.register_forward_hook(after))
            yield profiles
        finally:
            for hook in hooks:
                hook.remove()
    for inner, profile in of_module.items():
        profile.parameters = sum(parameter.numel() for parameter in inner.parameters())
    _fill_in_containers(module, of_module)


def _hooks(profile: ModuleProfile, total: Callable[[], int]) -> tuple[Callable[..., None], Callable[..., None]]:
    entered: list[tuple[int, float]] = []

    def before(*_: Any) -> None:
        entered.append((total(), _now()))

    def after(*_: Any) -> None:
        flops, seconds = entered.pop()
        profile.flops += total() - flops
        profile.seconds += _now() - seconds

    return before, after


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


def _fill_in_containers(module: nn.Module, of_module: dict[nn.Module, ModuleProfile]) -> None:
    """A module that is never called, as a ModuleList, has what its children have."""
    for child in module.children():
        _fill_in_containers(child, of_module)
    profile = of_module[module]
    if profile.seconds == 0:
        inside = [of_module[child] for child in module.children()]
        profile.flops = sum(child.flops for child in inside)
        profile.seconds = sum(child.seconds for child in inside)


def render(modules: list[ModuleProfile], config: FlopsProfilerConfig, step: int) -> str:
    """The profile as text.

    Args:
        modules: in the order of ``named_modules``.
        config: how deep, and whether each module gets a line.
        step: steps taken before the forward that was counted.
    """
    whole = modules[0]
    deepest = max(module.depth for module in modules)
    depth = deepest if config.module_depth == -1 else min(config.module_depth, deepest)
    both = whole.flops * (3 + config.recompute_fwd_factor)
    lines = [
        f"flops profile of {whole.kind}: one forward of one micro-batch on rank 0, after step {step}",
        f"  parameters                  {_short(whole.parameters)}",
        f"  forward MACs                {_short(whole.macs)}",
        f"  forward FLOPs               {_short(whole.flops)}",
        f"  forward and backward FLOPs  {_short(both)}",
        f"  forward time                {whole.seconds * 1000:.2f} ms, counting included",
        f"  forward FLOPs per second    {_short(whole.flops / whole.seconds) if whole.seconds else '?'}",
        f"most of parameters, MACs and time by depth (first {config.top_modules}):",
        *(_top(modules, level, config.top_modules) for level in range(depth + 1)),
    ]
    if config.detailed:
        lines += ["modules:", *(_detail(module, whole) for module in modules if module.depth <= depth)]
    return "\n".join(lines)


def _top(modules: list[ModuleProfile], depth: int, count: int) -> str:
    sums: dict[str, Counter[str]] = {"parameters": Counter(), "MACs": Counter(), "ms": Counter()}
    for module in modules:
        if module.depth == depth:
            sums["parameters"][module.kind] += module.parameters
            sums["MACs"][module.kind] += module.macs
            sums["ms"][module.kind] += round(module.seconds * 1000)
    shown = [
        f"{what} " + ", ".join(f"{kind} {_short(value)}" for kind, value in by_kind.most_common(count))
        for what, by_kind in sums.items()
    ]
    return f"  depth {depth}: " + " | ".join(shown)


def _detail(module: ModuleProfile, whole: ModuleProfile) -> str:
    parts = [
        f"{_short(module.parameters)} parameters ({_percent(module.parameters, whole.parameters)})",
        f"{_short(module.macs)} MACs ({_percent(module.macs, whole.macs)})",
        f"{module.seconds * 1000:.2f} ms ({_percent(module.seconds, whole.seconds)})",
    ]
    title = f"({module.name.rpartition('.')[2]}) {module.kind}" if module.name else module.kind
    return f"{'  ' * (module.depth + 1)}{title}: " + ", ".join(parts)


def _short(number: float) -> str:
    """12345678 as ``12.35 M``."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}"
    return f"{number:g}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
