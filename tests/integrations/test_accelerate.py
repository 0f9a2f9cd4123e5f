"""accelerate's loop with a DeepSpeedPlugin, as its guide writes it, on ranks without a GPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trainers import PLACES, Texts, make, worst

from hpc_ds.compat import activate

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Outcomes

pytestmark = pytest.mark.ranks

STAGES = (0, 2, 3)
BATCH = 4


def loop(accelerator: Any, folder: Path, micro_batch: int, pace: int = 1) -> dict[str, Any]:
    """Train, evaluate, save and go on; nothing in it knows of ranks or of DeepSpeed."""
    model = make("gpt2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + pace * step))
    loader = torch.utils.data.DataLoader(Texts(16), batch_size=micro_batch)
    check = torch.utils.data.DataLoader(Texts(6, seed=7), batch_size=2)
    model, optimizer, loader, check, schedule = accelerator.prepare(model, optimizer, loader, check, schedule)
    losses, skipped = [], []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach().reshape(1)).mean().item())
            skipped.append(accelerator.optimizer_step_was_skipped)
    model.eval()
    with torch.no_grad():
        rows = [accelerator.gather_for_metrics(model(input_ids=batch["input_ids"]).logits) for batch in check]
    accelerator.save_state(str(folder))
    whole = accelerator.get_state_dict(model)
    with torch.no_grad():
        before = model(**next(iter(check))).loss.item()
    accelerator.load_state(str(folder))
    with torch.no_grad():
        after = model(**next(iter(check))).loss.item()
    return {
        "losses": losses,
        "skipped": any(skipped),
        "rows": torch.cat(rows).shape,
        "kept": before == after,
        "processes": accelerator.num_processes,
        "kind": str(accelerator.distributed_type),
        "module": type(accelerator.unwrap_model(model)).__name__,
        "names": None if whole is None else sorted(whole),
        "rates": schedule.get_last_lr(),
    }


def with_plugin(_rank: int, stage: int, folder: Path) -> dict[str, Any]:
    activate()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the case before
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # older versions leave that of a Trainer here
    plugin = DeepSpeedPlugin(zero_stage=stage, gradient_accumulation_steps=2, gradient_clipping=1.0)
    return loop(Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2), folder, BATCH // 4)


def cases(folder: Path) -> dict[str, Any]:
    """What the ranks shall do, each in a folder of its own."""
    return {f"plugin-{stage}": (with_plugin, (stage, folder / f"plugin-{stage}")) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_its_loop_trains_as_in_one_process(came: Outcomes, stage: int, tmp_path: Path) -> None:
    from accelerate import Accelerator

    alone = loop(
        Accelerator(cpu=True, gradient_accumulation_steps=2), tmp_path, BATCH // 2, pace=2
    )  # it steps schedules once a process
    first, second = came[f"plugin-{stage}"]
    assert first["losses"] == second["losses"]
    assert worst(first["losses"], alone["losses"]) < 1e-5
    assert first["kept"]
    assert second["kept"]
    assert (first["processes"], first["kind"]) == (2, "DistributedType.DEEPSPEED")
    assert not first["skipped"]
    assert first["rows"] == alone["rows"] == (6, PLACES, 23)
    assert first["names"] == alone["names"]
    assert first["rates"] == alone["rates"]
