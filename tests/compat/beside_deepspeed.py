"""What both sides of test_scripts_beside_deepspeed.py run: examples/deepspeed_script, and questions to engines.

Under the real DeepSpeed it is a script of deepspeed_peer.py. Under ours it is a program, started once a rank by
``python -m hpc_ds.compat``; either way only ``import deepspeed`` says whose it is.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

# Script -> options of its first start, and of the second, which goes on from there.
SCRIPTS = {
    "cifar": (["--epochs", "2"], ["--epochs", "4"]),
    "bert": (["--steps", "3"], ["--steps", "6"]),
    "gpt": (["--steps", "4"], ["--steps", "8"]),
}


def answer(payload: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    sys.path.insert(0, str(Path(__file__).parent))
    from face_of_engine import questions

    examples, found = Path(payload["examples"]), {}
    for name, starts in SCRIPTS.items():
        saves = Path(payload["folder"], name)
        config = ["--deepspeed", "--deepspeed_config", str(examples / f"ds_{name}.json"), "--save_dir", str(saves)]
        main = runpy.run_path(str(examples / f"{name}.py"))["main"]
        told = [main([*config, *options]) for options in starts]
        dist.barrier()
        tags = sorted(path.name for path in saves.iterdir() if path.is_dir())
        found[name] = {"told": told, "latest": (saves / "latest").read_text(), "tags": tags}
        found[name]["exported"] = exported(saves) if dist.get_rank() == 0 else None
    return {"scripts": found, **questions(payload)}


def exported(saves: Path) -> list[Any]:
    """What the script that lies beside the checkpoints makes of the newest."""
    import torch

    words, sys.argv = sys.argv, ["zero_to_fp32.py", str(saves), str(saves / "out")]
    try:
        runpy.run_path(str(saves / "zero_to_fp32.py"), run_name="__main__")
    finally:
        sys.argv = words
    weights = torch.load(saves / "out" / "pytorch_model.bin", weights_only=True)
    return [[name, str(value.dtype), value.norm().item()] for name, value in sorted(weights.items())]


def main(folder: Path) -> None:
    """One rank of ours; the processes meet in a file."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size)
    value = answer(json.loads((folder / "payload.json").read_text(encoding="utf-8")))
    (folder / f"rank-{rank}.json").write_text(json.dumps(value), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
