"""How long is a step of Hugging Face's Trainer with --deepspeed, and how long does `import deepspeed` take: ours and theirs?

    python benchmarks/hf_trainer.py [--ranks 2] [--rounds 5] [--steps 4] [--stages 1 2 3] [--width 512] [--layers 8]

The same script, the same `ds_config.json`: once `deepspeed` is hpc_ds under its name, once DeepSpeed itself, as it is
installed for the tests (`python tests/install_deepspeed_peer.py`). GPT-2 made from its config, micro-batch 4 x 64 tokens a
rank, bf16, AdamW, clipping at 1; gloo on CPUs, NCCL where there are GPUs; one thread a rank. Every contestant runs in
processes of its own, which wait while the others have their turn. A step is timed from `on_step_begin` to `on_step_end`.
One JSON line a question, with medians, ratio and goal: 0.3 of the import, 0.75 of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from step_time import ask  # noqa: E402 - stands beside

PATHS = {"hpc_ds": [REPOSITORY / "hpc_ds" / "compat" / "path"], "DeepSpeed": []}
SAMPLES, CONTEXT, VOCABULARY = 4, 64, 256
STEP_GOAL, IMPORT_GOAL = 0.75, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    from deepspeed_peer import FOLDER

    if not FOLDER.exists():
        sys.exit(f"{FOLDER}: not there; run python tests/install_deepspeed_peer.py")
    PATHS["DeepSpeed"] = [FOLDER]
    compare_imports(arguments.rounds)
    for stage in arguments.stages:
        compare_steps(stage, arguments)


def environment(name: str) -> dict[str, str]:
    from deepspeed_peer import FOR_EVERY_RANK

    path = [*map(str, PATHS[name]), str(REPOSITORY)]
    return {**os.environ, **FOR_EVERY_RANK, "PYTHONPATH": os.pathsep.join(path), "TRANSFORMERS_VERBOSITY": "error"}


def compare_imports(rounds: int) -> None:
    """In processes of their own, one after the other; the first round, in which Python writes its bytecode, does not count."""
    taken: dict[str, list[float]] = {name: [] for name in PATHS}
    for _ in range(rounds + 1):
        for name in PATHS:
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", "import deepspeed"], env=environment(name), check=True, capture_output=True
            )
            taken[name].append(time.perf_counter() - began)
    seconds = {name: round(statistics.median(times[1:]), 3) for name, times in taken.items()}
    ratio = round(seconds["hpc_ds"] / seconds["DeepSpeed"], 3)
    print(json.dumps({"import deepspeed": seconds, "ratio": ratio, "goal": IMPORT_GOAL}), flush=True)


def compare_steps(stage: int, arguments: argparse.Namespace) -> None:
    """Both at one ZeRO stage, turn by turn."""
    taken: dict[str, list[float]] = {name: [] for name in PATHS}
    with tempfile.TemporaryDirectory(prefix="hpc_ds-hf-trainer-") as folder:
        teams = {name: start(name, stage, arguments, Path(folder)) for name in PATHS}
        for team in teams.values():
            ask(team, 3)  # warm-up
        for _ in range(arguments.rounds):
            for name, team in teams.items():
                taken[name] += ask(team, arguments.steps)[0]
        for team in teams.values():
            for process in team:
                process.kill()
                process.wait()
    ms = {name: round(statistics.median(times) * 1000, 1) for name, times in taken.items()}
    ratio = round(ms["hpc_ds"] / ms["DeepSpeed"], 3)
    line = {"stage": stage, "ranks": arguments.ranks, "step_ms": ms, "ratio": ratio, "goal": STEP_GOAL}
    print(json.dumps(line), flush=True)


def start(name: str, stage: int, arguments: argparse.Namespace, folder: Path) -> list[subprocess.Popen[bytes]]:
    team = []
    for rank in range(arguments.ranks):
        told = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(arguments.ranks),
            "LOCAL_SIZE": str(arguments.ranks),
        }
        told |= {
            "LOCAL_WORLD_SIZE": str(arguments.ranks),
            "STORE": str(folder / f"{name}-store"),
            "OUT": str(folder / name),
        }
        size = ["--width", str(arguments.width), "--layers", str(arguments.layers)]
        command = [sys.executable, __file__, "--worker", str(stage), *size]
        with (folder / f"{name}-{rank}.log").open("wb") as log:
            team.append(subprocess.Popen(
                command, env=environment(name) | told, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            ))  # fmt: skip
    return team


def work(arguments: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    gpus = torch.cuda.is_available()
    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(os.environ["STORE"], world_size)
    if gpus:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=world_size)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=arguments.width, n_layer=arguments.layers, n_head=8,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    asked = TrainingArguments(
        output_dir=os.environ["OUT"], deepspeed=ds_config(arguments.worker), bf16=True, use_cpu=not gpus, max_steps=100_000,
        per_device_train_batch_size=SAMPLES, learning_rate=1e-3, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    numbers = torch.arange(10_000).unsqueeze(1) * 7 + torch.arange(CONTEXT)
    texts = [{"input_ids": text, "labels": text} for text in numbers % VOCABULARY]
    Trainer(model=GPT2LMHeadModel(config), args=asked, train_dataset=texts, callbacks=[turns(gpus)]).train()


def turns(gpus: bool) -> Any:
    """A callback that takes steps when told to, and tells how long they took."""
    import torch
    import torch.distributed as dist
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def __init__(self) -> None:
            self._left, self._times, self._began = 0, [], 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if self._left == 0:
                self._left, self._times = int(sys.stdin.readline() or os._exit(0)), []
            dist.barrier()
            self._began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpus:
                torch.cuda.synchronize()
            self._times.append(time.perf_counter() - self._began)
            self._left -= 1
            if self._left == 0:
                print("TIMES " + json.dumps({"times": self._times, "loss": None}), flush=True)

    return Turns()


def ds_config(stage: int) -> dict[str, Any]:
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    return {
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto", "bf16": {"enabled": "auto"}, "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": stage},
    }  # fmt: skip


if __name__ == "__main__":
    main()
