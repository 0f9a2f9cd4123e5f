"""A small convolutional network on CIFAR-like images, written for DeepSpeed: initialize makes optimizer and data loader.

python -m hpc_ds.compat python cifar.py --deepspeed --deepspeed_config ds_cifar.json
"""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset


class Net(nn.Module):
    """Two convolutions and two linear layers, for images of (3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of (samples, 10)."""
        x = self.pool(functional.relu(self.conv1(x)))
        x = self.pool(functional.relu(self.conv2(x)))
        return self.fc2(functional.relu(self.fc1(torch.flatten(x, 1))))


def add_arguments(given: list[str] | None) -> argparse.Namespace:
    """The script's options, and DeepSpeed's."""
    parser = argparse.ArgumentParser(description="CIFAR")
    parser.add_argument("-e", "--epochs", default=3, type=int, help="number of total epochs")
    parser.add_argument("--local_rank", type=int, default=-1, help="local rank passed from distributed launcher")
    parser.add_argument("--save_dir", type=str, default="checkpoints", help="where checkpoints are")
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args(given)


def images(count: int = 16) -> TensorDataset:
    """Random images with labels that can be learned by heart."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(count, 3, 32, 32, generator=generator), torch.randint(10, (count,), generator=generator)
    )


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Train; what happened, for those who compare."""
    args = add_arguments(given)
    torch.manual_seed(2)
    net = Net()
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    model_engine, _, trainloader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=parameters, training_data=images()
    )
    criterion = nn.CrossEntropyLoss()
    _, client_state = model_engine.load_checkpoint(args.save_dir)
    first = 0
    if client_state is not None:
        first = client_state["epoch"] + 1
    dtype = torch.bfloat16 if model_engine.bfloat16_enabled() else torch.float32
    losses = []
    for epoch in range(first, args.epochs):
        for data in trainloader:
            inputs, labels = data[0].to(model_engine.device, dtype), data[1].to(model_engine.device)
            outputs = model_engine(inputs)
            loss = criterion(outputs.float(), labels)
            model_engine.backward(loss)
            model_engine.step()
            losses.append(loss.item())
        saved = model_engine.save_checkpoint(args.save_dir, client_state={"epoch": epoch})
    return {"first": first, "losses": losses, "saved": saved, "steps": model_engine.global_steps}


if __name__ == "__main__":
    print(main())
