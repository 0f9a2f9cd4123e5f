"""For the peer: trains a small model with DeepSpeed in many ways, saves, tells what it saved, and trains on.

The same model and data are used by the tests, without DeepSpeed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

STEPS = 3  # before the save, and after it
VOCABULARY = 11


class Net(nn.Module):
    """Sizes that nothing divides, a tied and some frozen parameters, one that is small, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 7)
        self.frozen = nn.Linear(7, 7)
        self.body = nn.ModuleList([nn.Linear(7, 7) for _ in range(3)])
        self.norm = nn.LayerNorm(7)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("factor", torch.full((3,), 0.5))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.frozen(hidden)
        for layer in self.body:
            hidden = torch.tanh(layer(hidden))
        hidden = self.norm(hidden) * self.factor.mean() * self.gain
        return nn.functional.cross_entropy(self.head(hidden).float(), targets)


def model(case: dict[str, Any]) -> Net:
    torch.manual_seed(0)
    net = Net()
    net.frozen.requires_grad_(case.get("all_train", False))
    return net


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    tokens, targets = torch.randint(0, VOCABULARY, (2, 20), generator=generator)
    return tokens, targets


def groups(net: nn.Module, kind: str) -> list[dict[str, Any]]:
    """One group; those with and without weight decay; or one parameter in a group of its own."""
    named = [(name, value) for name, value in net.named_parameters() if value.requires_grad]
    if kind == "one":
        return [{"params": [value for _, value in named]}]
    first = [value for name, value in named if (value.dim() > 1 if kind == "decay" else name != "gain")]
    second = [value for _, value in named if not any(value is other for other in first)]
    return [{"params": first, "weight_decay": 0.1}, {"params": second, "weight_decay": 0.0}]


def optimizer(net: nn.Module, case: dict[str, Any]) -> torch.optim.Optimizer:
    of = groups(net, case.get("groups", "one"))
    if case.get("optimizer") == "SGD":
        return torch.optim.SGD(of, lr=0.02, momentum=0.9)
    return torch.optim.AdamW(of, lr=0.01, weight_decay=0.01)


def config(case: dict[str, Any]) -> dict[str, Any]:
    """What both engines are told."""
    zero = {"stage": case["stage"]}
    told: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": zero}
    told["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 8, "warmup_max_lr": 0.01}}
    if case["type"] != "fp32":
        told[case["type"]] = {"enabled": True}
        told["communication_data_type"] = "fp32"  # what 16 bits round off a sum over ranks is no matter of a checkpoint
    if case["type"] == "fp16":
        told["fp16"]["initial_scale_power"] = 6
    return told


def answer(payload: dict[str, Any]) -> dict[str, Any]:
    """Case -> losses of this rank after the save."""
    return {name: _run(payload["folder"], name, case) for name, case in payload["cases"].items()}


def _run(folder: str, name: str, case: dict[str, Any]) -> list[float]:
    import deepspeed
    import deepspeed.comm as dist

    print(f"case {name}", flush=True)
    net = model(case)
    told = config(case)
    told["zero_allow_untested_optimizer"] = True
    told["zero_optimization"] |= case.get("zero", {})
    told |= case.get("more", {})
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer(net, case), config=told)
    for step in range(STEPS):
        _step(engine, step)
    client = {"epoch": 3, "seen": torch.arange(4), "nested": {"a": [1.5, (2, None)]}}
    engine.save_checkpoint(f"{folder}/{name}", client_state=client)
    truth = _truth(engine, net, case)
    if dist.get_rank() == 0:
        torch.save(truth, f"{folder}/{name}.truth")
    losses = [_step(engine, step) for step in range(STEPS, 2 * STEPS)]
    # Only now has every rank written its part; and what keeps its own fp32 gradients, its tool does not read.
    if dist.get_rank() == 0 and case["stage"] and "more" not in case:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        torch.save(get_fp32_state_dict_from_zero_checkpoint(f"{folder}/{name}"), f"{folder}/{name}.fp32")
    return losses


def _step(engine: Any, step: int) -> float:
    import deepspeed.comm as dist

    loss = engine(*batch(step, dist.get_rank()))
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def _truth(engine: Any, net: nn.Module, case: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Parameter -> its master and optimizer state, whole, as DeepSpeed itself tells them. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    keys = ["momentum_buffer"] if case.get("optimizer") == "SGD" else ["exp_avg", "exp_avg_sq"]
    found = {}
    for name, value in net.named_parameters():
        if not value.requires_grad:
            continue
        if case["stage"]:
            states = {key: _state(engine, value, key, case["stage"]) for key in keys}
            found[name] = {"master": safe_get_full_fp32_param(value), **states}
        else:
            master = _master(engine.optimizer, value)
            states = getattr(engine.optimizer, "optimizer", engine.optimizer).state[master]
            found[name] = {"master": master.detach(), **{key: states[key] for key in keys}}
    return {name: {key: value.clone() for key, value in of.items()} for name, of in found.items()}


def _state(engine: Any, parameter: Any, key: str, stage: int) -> torch.Tensor:
    """Collective. A parameter's optimizer state, whole.

    At stages 1 and 2 safe_get_full_optimizer_state finds none that was made after the optimizer: its way, on the live state.
    """
    import deepspeed.comm as dist
    from deepspeed.utils import safe_get_full_optimizer_state

    if stage == 3:
        return safe_get_full_optimizer_state(parameter, key)
    wrapper = engine.optimizer
    whole = torch.zeros(parameter.numel())
    if parameter._hp_mapping is not None:
        here, there = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
        flats = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
        flat = wrapper.optimizer.state[flats[parameter._hp_mapping.param_group_index]][key]
        whole[here.start : here.start + here.numel] = flat[there.start : there.start + there.numel]
    dist.all_reduce(whole)
    return whole.view(parameter.shape)


def _master(wrapper: Any, parameter: torch.Tensor) -> torch.Tensor:
    """The fp32 copy that stage 0 keeps of a 16-bit parameter; in fp32 the parameter itself."""
    for halves, masters in zip(getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ()), strict=True):
        for half, master in zip(halves, masters, strict=True):
            if half is parameter:
                return master
    return parameter
