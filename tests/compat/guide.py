"""A script as DeepSpeed's getting-started guide has it; it knows nothing of hpc_ds. Each rank writes down what it saw."""

import argparse
import json
import os
from pathlib import Path

before = {
    name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
}

import deepspeed  # noqa: E402
import torch  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--told", default="told")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--load_dir")
parser.add_argument("--ckpt_id")
parser.add_argument("--save_dir", default="saved")
parser.add_argument("--save_interval", type=int, default=2)
parser = deepspeed.add_config_arguments(parser)
cmd_args = parser.parse_args()

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
model_engine, optimizer, data_loader, _ = deepspeed.initialize(
    args=cmd_args, model=net, model_parameters=net.parameters(), training_data=data
)
begun, client_sd = 0, {}
if cmd_args.load_dir:
    _, client_sd = model_engine.load_checkpoint(cmd_args.load_dir, cmd_args.ckpt_id)
    begun = client_sd["step"]

losses = []
for step, (inputs, labels) in enumerate(data_loader, start=begun + 1):
    if step > cmd_args.steps:
        break
    outputs = model_engine(inputs.half() if model_engine.fp16_enabled() else inputs)
    loss = torch.nn.functional.mse_loss(outputs.float(), labels)
    model_engine.backward(loss)
    model_engine.step()
    losses.append(loss.item())
    if step % cmd_args.save_interval == 0:
        client_sd["step"] = step
        ckpt_id = loss.item()
        model_engine.save_checkpoint(cmd_args.save_dir, ckpt_id, client_sd=client_sd)

told = {
    "before": before, "begun": begun, "losses": losses, "host": os.uname().nodename, "local_rank": cmd_args.local_rank,
    "environ": {name: os.environ.get(name) for name in ("NCCL_DEBUG", "MINE")}, "package": deepspeed.__file__,
    "deepspeed": cmd_args.deepspeed, "engine": isinstance(model_engine, deepspeed.DeepSpeedEngine),
    "micro_batch": model_engine.train_micro_batch_size_per_gpu(), "stage": model_engine.zero_optimization_stage(),
    "parameters": [parameter.detach().double().sum().item() for parameter in net.parameters()],
}  # fmt: skip
Path(cmd_args.told).mkdir(exist_ok=True)
Path(cmd_args.told, f"{torch.distributed.get_rank()}.json").write_text(json.dumps(told))
