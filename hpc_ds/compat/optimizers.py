"""DeepSpeed's optimizers, with its parameters and defaults: torch's, and ours where torch has none.

| DeepSpeed's                  | here                                                                               |
|------------------------------|------------------------------------------------------------------------------------|
| FusedAdam, DeepSpeedCPUAdam  | torch's Adam, fused, with decoupled weight decay unless told otherwise             |
| the same, bias_correction    | False: the engine's ``UncorrectedAdam``, which is then no instance of their class  |
| DeepSpeedCPUAdagrad          | torch's Adagrad                                                                    |
| FusedLion, DeepSpeedCPULion  | the engine's Lion                                                                  |
| FusedLamb                    | the engine's Lamb                                                                  |

They train at all stages, given to ``initialize``, and without an engine too. Parameters that choose between implementations
are accepted, for there is one of each.

Source: https://deepspeed.readthedocs.io/en/latest/optimizers.html, release 0.19.8
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from hpc_ds.engine.lamb import Lamb
from hpc_ds.engine.lion import Lion
from hpc_ds.engine.uncorrected_adam import UncorrectedAdam
from hpc_ds.errors import ConfigError


class FusedAdam(torch.optim.Adam):
    """Adam, whose weight decay is AdamW's unless ``adam_w_mode`` is False."""

    elementwise: ClassVar[bool] = True

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An ``UncorrectedAdam`` where no bias correction is asked for."""
        if cls in {FusedAdam, DeepSpeedCPUAdam} and not (
            args[2] if len(args) > 2 else kwargs.get("bias_correction", True)
        ):
            return _uncorrected(*args, **kwargs)
        return super().__new__(cls)

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,  # noqa: ARG002 - DeepSpeed's signature
    ) -> None:
        _refuse(type(self), **{"amsgrad": amsgrad, "bias_correction=False": not bias_correction})
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=adam_w_mode, fused=True)


class DeepSpeedCPUAdam(FusedAdam):
    """The same; it is on the CPU where its parameters are, as with ``offload_optimizer``."""

    elementwise: ClassVar[bool] = True

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        model_params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,  # noqa: ARG002 - DeepSpeed's signature
    ) -> None:
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay, amsgrad)


def _uncorrected(
    params: Any = None,
    lr: float = 1e-3,
    bias_correction: bool = True,  # noqa: ARG001 - False
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **others: Any,
) -> UncorrectedAdam:
    _refuse(FusedAdam, amsgrad=others.get("amsgrad", False))
    parameters: Any = others.get("model_params") if params is None else params
    return UncorrectedAdam(
        parameters,
        lr,
        betas,
        eps,
        others.get("weight_decay", 0.0),
        others.get("adam_w_mode", others.get("adamw_mode", True)),
    )


class DeepSpeedCPUAdagrad(torch.optim.Adagrad):
    """Adagrad."""

    elementwise: ClassVar[bool] = True

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,  # noqa: ARG002 - DeepSpeed's signature
    ) -> None:
        _refuse(type(self), amsgrad=amsgrad)
        super().__init__(model_params, lr, weight_decay=weight_decay, eps=eps)


class FusedLion(Lion):
    """Lion."""

    elementwise: ClassVar[bool] = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,  # noqa: ARG002 - DeepSpeed's signature
    ) -> None:
        super().__init__(params, lr, betas, weight_decay)


class DeepSpeedCPULion(Lion):
    """Lion."""

    elementwise: ClassVar[bool] = True

    def __init__(
        self,
        model_params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        fp32_optimizer_states: bool = True,  # noqa: ARG002 - DeepSpeed's signature
    ) -> None:
        super().__init__(model_params, lr, betas, weight_decay)


class FusedLamb(Lamb):
    """Lamb."""

    def __init__(  # noqa: PLR0913 - DeepSpeed's signature
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        _refuse(type(self), amsgrad=amsgrad, max_grad_norm=max_grad_norm > 0)
        super().__init__(
            params, {}, lr, bias_correction, betas, eps, eps_inside_sqrt, weight_decay, max_coeff, min_coeff
        )


_CURES = {
    "amsgrad": "leave it out",
    "max_grad_norm": "use gradient_clipping in the config",
    "bias_correction=False": "use the class itself, not one derived from it",
}


def _refuse(kind: type, **asked: bool) -> None:
    for name, is_asked in asked.items():
        if is_asked:
            raise ConfigError(f"{kind.__name__}: {name} is not supported; {_CURES[name]}")
