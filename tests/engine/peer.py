"""What both sides of test_against_deepspeed.py share, and the answers of the real DeepSpeed: see deepspeed_peer.py."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

PLACES, TOKENS, WIDTH = 12, 31, 24


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.attend(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        x = x + functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.down(functional.gelu(self.up(self.after(x))))


class TinyGpt(nn.Module):
    """Next-token prediction; its weights are bf16 numbers, for DeepSpeed makes its fp32 masters from the bf16 model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        for parameter in self.parameters():
            parameter.data = parameter.data.bfloat16().float()

    def forward(self, text: torch.Tensor) -> torch.Tensor:  # (samples, places + 1) tokens -> mean loss
        x = self.tokens(text[:, :-1]) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        return functional.cross_entropy(self.head(x).float().flatten(0, 1), text[:, 1:].flatten())


def losses(engine: Any, rank: int, world_size: int, steps: int, accumulation: int) -> list[float]:
    """The mean loss of this rank at each step, on text of which a part can be learned."""
    found = []
    for step in range(steps):
        total = 0.0
        for part in range(accumulation):
            seed = (step * accumulation + part) * world_size + rank
            drawn = torch.Generator().manual_seed(seed)
            noise = torch.randint(TOKENS, (4, PLACES + 1), generator=drawn)
            line = (noise[:, :1] + 3 * torch.arange(PLACES + 1)) % TOKENS
            text = torch.where(torch.rand(noise.shape, generator=drawn) < 0.4, noise, line)
            loss = engine(text)
            engine.backward(loss)
            engine.step()
            total += loss.item() / accumulation
        found.append(total)
    return found


# What the answers are about: the same on both sides.


def optimizer_for_schedule(kind: str) -> torch.optim.Optimizer:
    """Two groups, the second with a rate of its own."""
    first, second = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    made: torch.optim.Optimizer = getattr(torch.optim, kind)(
        [{"params": [first]}, {"params": [second], "lr": 0.2}], lr=0.1
    )
    return made


def rates(schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
    """Learning rate, and betas if there are any, of every group, from construction on."""
    found = []
    for step in range(steps + 1):
        if step:
            optimizer.step()
            schedule.step()
        found.append([[group["lr"], *group.get("betas", ())] for group in optimizer.param_groups])
    return found


def matrices() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(6)
    shapes = {"up": (7, 4), "down": (4, 7), "square": (5, 5), "batch": (2, 5, 3), "embed": (6, 3), "bias": (4,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def moved_by(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: int
) -> dict[str, list[float]]:
    """The parameters after some steps along fixed gradients."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.flatten().tolist() for name, parameter in parameters.items()}


# The peer's side: only here is DeepSpeed imported.


def answer(payload: dict[str, Any]) -> dict[str, Any]:
    return {
        "rates": [_rates(*case, steps=payload["steps"]) for case in payload["schedules"]],
        "scales": [_scales(*case) for case in payload["scales"]],
        "batches": [_batch(*case) for case in payload["batches"]],
        "muon": [_muon(**case) for case in payload["muon"]],
        "curves": [_curve(config, payload["curve_steps"]) for config in payload["curves"]],
    }


def _rates(kind: str, params: dict[str, Any], optimizer_name: str, steps: int) -> list[Any]:
    from deepspeed.runtime import lr_schedules

    optimizer = optimizer_for_schedule(optimizer_name)
    return rates(getattr(lr_schedules, kind)(optimizer, **params), optimizer, steps)


def _scales(fp16: dict[str, Any], story: str) -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
    from deepspeed.runtime.precision_config import get_float16_config

    config = get_float16_config({"fp16": fp16})
    scaler = CreateLossScaler(torch.half, config.loss_scale, config.loss_scale == 0, config.dynamic_loss_scale_args())
    found: list[Any] = [scaler.cur_scale]
    for step in story:
        try:
            scaler.update_scale(step == "x")
        except Exception as error:
            if "already at minimum" not in str(error):
                raise
            return [*found, "diverged"]
        found.append(scaler.cur_scale)
    return found


def _batch(sizes: dict[str, int], world_size: int) -> list[int] | str:
    from deepspeed.runtime.config import DeepSpeedConfig

    mpu = SimpleNamespace(get_data_parallel_world_size=lambda: world_size)
    try:
        config = DeepSpeedConfig(dict(sizes), mpu)
    except AssertionError:
        return "refused"
    return [config.train_batch_size, config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps]


def _muon(muon: dict[str, Any], adam: dict[str, Any], steps: int) -> dict[str, list[float]]:
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    original_muon.ns_compute_dtype = lambda _: torch.float32  # it computes in half precision where the CPU can
    parameters = matrices()
    hidden = [parameter for name, parameter in parameters.items() if name not in {"embed", "bias"}]
    others = [parameters["embed"], parameters["bias"]]
    groups = [{"params": hidden, "use_muon": True, **muon}, {"params": others, "use_muon": False, **adam}]
    return moved_by(muon_optimizer.MuonWithAuxAdam(groups), parameters, steps)


def _curve(config: dict[str, Any], steps: int) -> list[float]:
    import deepspeed
    import deepspeed.comm as dist

    engine, *_ = deepspeed.initialize(model=TinyGpt(), config=config)
    if config["zero_optimization"]["stage"] == 0:
        _undo_the_step_of_its_construction(engine.optimizer)
    return losses(engine, dist.get_rank(), dist.get_world_size(), steps, engine.gradient_accumulation_steps())


def _undo_the_step_of_its_construction(optimizer: Any) -> None:
    """At stage 0 it takes a step with zero gradients while it is built: Adam counts it, and decays the masters."""
    for state in optimizer.optimizer.state.values():
        assert state["step"] == 1
        state["step"].zero_()
    for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, parameter in zip(masters, parameters, strict=True):
            master.data.copy_(parameter.data)


def all_batch_cases() -> list[tuple[dict[str, int], int]]:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    choices = ((None, 1, 8, 12, 16), (None, 1, 2, 3, 8), (None, 1, 2, 4))
    return [
        ({key: size for key, size in zip(keys, sizes, strict=True) if size is not None}, world_size)
        for sizes in itertools.product(*choices)
        for world_size in (1, 2, 4)
    ]
