"""The next token for a decoder like GPT, written for DeepSpeed: ZeRO 3, an optimizer and a schedule of the script's own.

python -m hpc_ds.compat python gpt.py --deepspeed --deepspeed_config ds_gpt.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

TOKENS, PLACES, WIDTH = 41, 16, 32


class Layer(nn.Module):
    """Attention to what came before, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From (samples, places, width) to the same."""
        query, key, value = self.attend(self.norm(x)).unflatten(-1, (3, 4, WIDTH // 4)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.after(x))))


class Gpt(nn.Module):
    """Embeddings, layers, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """The mean loss of (samples, places + 1) tokens."""
        x = self.tokens(text[:, :-1]) + self.places(torch.arange(PLACES, device=text.device))
        for layer in self.layers:
            x = layer(x)
        return functional.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), text[:, 1:].flatten())


def batch(step: int, samples: int = 4) -> torch.Tensor:
    """(samples, places + 1) tokens that can be guessed from the first, other ones on each rank and in each step."""
    generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    return (torch.randint(TOKENS, (samples, 1), generator=generator) + 5 * torch.arange(PLACES + 1)) % TOKENS


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The script's options, and DeepSpeed's."""
    parser = argparse.ArgumentParser(description="causal language model")
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--save_dir", default="checkpoints")
    return deepspeed.add_config_arguments(parser).parse_args(given)


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train; what happened, for those who compare."""
    args = arguments(given)
    deepspeed.init_distributed()
    torch.manual_seed(5)
    model = Gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    engine, optimizer, loader, scheduler = deepspeed.initialize(
        args=args,
        model=model,
        optimizer=optimizer,
        lr_scheduler=lambda made: torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, (step + 1) / 4)),
    )
    load_path, client_sd = engine.load_checkpoint(args.save_dir, load_module_strict=True)
    step = client_sd["step"] if load_path else 0
    told: dict[str, Any] = {"first": step, "losses": [], "returned": [loader is None, engine.train(), engine.eval()]}
    engine.train()
    while step < args.steps:
        loss = engine(batch(step).to(engine.device))
        told["returned"].append(engine.backward(loss).item() - loss.item())
        told["returned"].append(engine.step())
        step += 1
        told["losses"].append(loss.item())
    told["saved"] = engine.save_checkpoint(args.save_dir, client_state={"step": step}, save_latest=True)
    told["saved"] &= engine.save_checkpoint(args.save_dir, "not_the_latest", {"step": -1}, save_latest=False)
    told["saved"] &= engine.save_16bit_model(args.save_dir, "weights.bin")
    with deepspeed.zero.GatheredParameters(list(model.head.parameters()), modifier_rank=None):
        told["head"] = [tuple(model.head.weight.shape), model.head.weight.float().norm().item()]
    engine.eval()
    with torch.no_grad():
        told["evaluated"] = engine(batch(1000).to(engine.device)).item()
    if dist.get_rank() == 0:
        weights = torch.load(Path(args.save_dir) / "weights.bin", weights_only=True)
        told["weights"] = [[name, list(value.shape), str(value.dtype)] for name, value in weights.items()]
    told["rate"] = scheduler.get_last_lr()
    return told


if __name__ == "__main__":
    print(main())
