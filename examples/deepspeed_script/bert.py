"""Masked tokens for an encoder like BERT, written for DeepSpeed: gradient accumulation, a schedule, a loader of its own.

python -m hpc_ds.compat python bert.py --deepspeed_config ds_bert.json
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

TOKENS, PLACES, WIDTH, MASK = 37, 12, 32, 0


class Bert(nn.Module):
    """Token and place embeddings, encoder layers, and a head whose weight is that of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, activation="gelu", batch_first=True) for _ in range(2)
        )
        nn.init.normal_(self.tokens.weight, std=0.1)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.head.weight = self.tokens.weight

    def forward(self, text: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of the masked places of (samples, places) tokens; labels are -100 elsewhere."""
        x = self.tokens(text) + self.places.weight
        for layer in self.layers:
            x = layer(x)
        return functional.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def masked_text(count: int = 64) -> TensorDataset:
    """Lines of which each token follows from the one before, and a sixth of them hidden."""
    generator = torch.Generator().manual_seed(3)
    text = (torch.randint(1, TOKENS, (count, 1), generator=generator) + torch.arange(PLACES)) % (TOKENS - 1) + 1
    hidden = torch.rand(text.shape, generator=generator) < 0.16
    hidden[:, 3] = True
    return TensorDataset(text.masked_fill(hidden, MASK), text.masked_fill(~hidden, -100))


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The script's options, and DeepSpeed's."""
    parser = argparse.ArgumentParser(description="masked language model")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--save_dir", default="checkpoints")
    return deepspeed.add_config_arguments(parser).parse_args(given)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights decay, biases and norms do not."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def train(engine: Any, scheduler: Any, step: int, args: argparse.Namespace) -> dict[str, Any]:
    """From one step to the last, with a checkpoint every three."""
    dataset = masked_text()
    sampler = DistributedSampler(dataset, dist.get_world_size(), dist.get_rank())
    loader = DataLoader(dataset, engine.train_micro_batch_size_per_gpu(), sampler=sampler)
    told: dict[str, Any] = {"first": step, "losses": [], "norms": [], "rates": [], "boundaries": []}
    engine.train()
    while step < args.steps:
        sampler.set_epoch(step)
        for text, labels in loader:
            loss = engine(text.to(engine.device), labels.to(engine.device))
            engine.backward(loss)
            told["losses"].append(loss.item())
            last = engine.is_gradient_accumulation_boundary()
            told["boundaries"].append(last)
            engine.step()
            if last:
                step += 1
                told["norms"].append(float(engine.get_global_grad_norm()))
                told["rates"].append([scheduler.get_last_lr(), engine.get_lr()])
            if last and step % 3 == 0:
                engine.save_checkpoint(args.save_dir, tag=f"step{step}", client_state={"step": step})
                break
    return {**told, "skipped": engine.skipped_steps, "samples": engine.global_samples}


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train; what happened, for those who compare."""
    args = arguments(given)
    deepspeed.init_distributed()
    torch.manual_seed(4)
    model = Bert()
    engine, _, _, scheduler = deepspeed.initialize(args=args, model=model, model_parameters=groups(model))
    load_path, client_state = engine.load_checkpoint(args.save_dir)
    return train(engine, scheduler, 0 if load_path is None else client_state["step"], args)


if __name__ == "__main__":
    print(main())
