"""What people do with a Trainer besides training: save, resume, evaluate, take the best, generate, adapt with LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from hf_models import MODELS
from trainers import Texts, adapted_to, config, make, plain, told, trainer, worst

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Outcomes

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]

STAGES = (0, 1, 2, 3)
BF16 = {"bf16": True}


def resume(_rank: int, stage: int, folder: Path) -> dict[str, Any]:
    """Train with saves, then again from the middle."""
    asked = {"save_strategy": "steps", "save_steps": 2} | BF16
    whole = trainer("gpt2", folder, config(stage), **asked)
    whole.train()
    again = trainer("gpt2", folder, config(stage), **asked)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    return {
        "whole": [
            (entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in whole.state.log_history[:-1]
        ],
        "again": [
            (entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in again.state.log_history[:-1]
        ],
        "files": sorted(path.name for path in (folder / "checkpoint-4").iterdir()),
    }


def accumulate(_rank: int, stage: int, folder: Path) -> list[float]:
    made = trainer("llama", folder, config(stage, scheduler=False), gradient_accumulation_steps=2, **BF16)
    made.train()
    return told(made, "loss")


def best(_rank: int, stage: int, folder: Path) -> dict[str, Any]:
    """Evaluate at each save; a rate that is too large makes the first the best, which comes back at the end."""
    how = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1,
        "load_best_model_at_end": True, "learning_rate": 1.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    made = trainer("gpt2", folder, config(stage, scheduler=False), **how, **BF16)
    made.train()
    after = made.evaluate()["eval_loss"]
    best_folder = made.state.best_model_checkpoint
    return {
        "evals": told(made, "eval_loss"),
        "after": after,
        "best": best_folder,
        "left": sorted(path.name for path in folder.glob("checkpoint-*")),
    }


def save_model(rank: int, name: str, stage: int, folder: Path) -> None:
    """Leave weights as a Trainer does, and those that the engine has beside them."""
    made = trainer(name, folder, config(stage), **BF16)
    made.train()
    made.save_model()
    whole = made.deepspeed.module_state_dict()
    if rank == 0:
        torch.save(whole, folder / "whole.pt")


def generate(_rank: int, stage: int, folder: Path) -> tuple[list[list[int]], dict[str, torch.Tensor] | None]:
    """Generate in the evaluation of a Seq2SeqTrainer; ranks have texts of different lengths."""
    from hpc_ds.compat import activate

    activate()
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    asked = Seq2SeqTrainingArguments(
        output_dir=str(folder), deepspeed=config(stage), use_cpu=True, report_to="none", bf16=True, max_steps=2,
        per_device_train_batch_size=2, per_device_eval_batch_size=2, predict_with_generate=True,
        disable_tqdm=True,
    )  # fmt: skip
    made = Seq2SeqTrainer(model=make("t5"), args=asked, train_dataset=Texts(), eval_dataset=Texts(6, seed=6))
    made.train()
    predicted = made.predict(Texts(6, seed=7)).predictions[:6].tolist()  # Trainer leaves those that fill the last batch
    whole = made.deepspeed.module_state_dict()
    return predicted, whole


def lora(_rank: int, stage: int, folder: Path) -> dict[str, Any]:
    from hpc_ds.compat import activate

    activate()
    made = trainer("llama", folder, config(stage, scheduler=False), model=adapted_to(make("llama")), **BF16)
    made.train()
    made.save_model()
    dist.barrier()
    frozen = {name for name, value in made.model.named_parameters() if not value.requires_grad}
    return {"loss": told(made, "loss"), "files": sorted(path.name for path in folder.iterdir()), "frozen": len(frozen)}


def evaluate_only(_rank: int, folder: Path) -> float:
    """ZeRO inference: no training before."""
    return trainer("gpt2", folder, config(3), **BF16).evaluate()["eval_loss"]


def overflow(_rank: int, stage: int, folder: Path) -> dict[str, Any]:
    """In fp16 a first scale that is too large: steps are skipped, and neither rate nor weights move in them."""
    asked = config(stage)
    asked["fp16"] |= {"initial_scale_power": 24, "hysteresis": 1}
    made = trainer("gpt2", folder, asked, fp16=True, max_steps=12)
    made.train()
    return {
        "rates": told(made, "learning_rate"),
        "skipped": made.deepspeed.skipped_steps,
        "scale": made.deepspeed.optimizer.cur_scale,
    }


def cases(folder: Path) -> dict[str, Any]:
    """What the ranks shall do, each in a folder of its own."""
    made: dict[str, Any] = {}
    for stage in STAGES:
        made[f"resume-{stage}"] = resume, (stage, folder / f"resume-{stage}")
        made[f"accumulate-{stage}"] = accumulate, (stage, folder / f"accumulate-{stage}")
    for stage in (1, 3):
        made[f"best-{stage}"] = best, (stage, folder / f"best-{stage}")
        made[f"overflow-{stage}"] = overflow, (stage, folder / f"overflow-{stage}")
        made[f"lora-{stage}"] = lora, (stage, folder / f"lora-{stage}")
        made[f"generate-{stage}"] = generate, (stage, folder / f"generate-{stage}")
    for name in MODELS:
        made[f"save-{name}"] = save_model, (name, 3, folder / f"save-{name}")
    made["save-at-2"] = save_model, ("gpt2", 2, folder / "save-at-2")
    made["evaluate"] = evaluate_only, (folder / "evaluate",)
    return made


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_it_goes_on_as_if_never_interrupted(came: Outcomes, stage: int) -> None:
    for rank in came[f"resume-{stage}"]:
        assert rank["again"] == rank["whole"]
        assert {"global_step4", "latest", "trainer_state.json", "rng_state_1.pth", "model.safetensors"} <= set(
            rank["files"]
        )


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_are_summed_as_in_one_process(came: Outcomes, stage: int, tmp_path: Path) -> None:
    alone = plain("llama", tmp_path, gradient_accumulation_steps=2, **BF16)
    assert worst(came[f"accumulate-{stage}"][0], alone["loss"]) < 4e-3


@pytest.mark.parametrize("stage", [1, 3])
def test_the_best_model_comes_back_at_the_end(came: Outcomes, stage: int) -> None:
    for rank in came[f"best-{stage}"]:
        assert rank["after"] == min(rank["evals"][:-1])
        assert rank["best"].endswith(f"checkpoint-{rank['evals'].index(rank['after']) + 1}")
        assert [rank["best"].rpartition("/")[2]] == rank["left"]


@pytest.mark.parametrize("name", ["at-2", *MODELS])
def test_saved_weights_load_into_the_plain_model(came: Outcomes, folder: Path, name: str) -> None:
    assert came[f"save-{name}"] == [None, None]
    left = folder / f"save-{name}"
    wanted = torch.load(left / "whole.pt", weights_only=True)
    loaded = type(make("gpt2" if name == "at-2" else name)).from_pretrained(left, dtype=torch.float32).state_dict()
    assert loaded.keys() == wanted.keys()
    for key, value in loaded.items():
        assert torch.equal(value, wanted[key].to(torch.bfloat16).float())


@pytest.mark.parametrize("stage", [1, 3])
def test_it_generates_what_the_plain_model_does(came: Outcomes, stage: int) -> None:
    (first, whole), (second, _) = came[f"generate-{stage}"]
    alone = make("t5")
    alone.load_state_dict(whole)
    texts = torch.stack([Texts(6, seed=7)[index]["input_ids"] for index in range(6)])
    wanted = alone.to(torch.bfloat16).generate(input_ids=texts, max_new_tokens=20).tolist()
    assert first == second
    for row, text in zip(first, wanted, strict=True):
        told = [token for token in row if token != -100]  # where the other rank's texts were longer
        assert told == text[: len(told)]
        assert len(told) > 5


@pytest.mark.parametrize("stage", [1, 3])
def test_adapters_train_as_in_one_process(came: Outcomes, stage: int, tmp_path: Path) -> None:
    made = trainer("llama", tmp_path, None, model=adapted_to(make("llama")), **BF16)
    made.train()
    for rank in came[f"lora-{stage}"]:
        assert worst(rank["loss"], told(made, "loss")) < 4e-3
        assert "adapter_model.safetensors" in rank["files"]
        assert rank["frozen"] > 0


def test_a_sharded_model_is_evaluated_without_training(came: Outcomes, tmp_path: Path) -> None:
    alone = trainer("gpt2", tmp_path, None, bf16=True).evaluate()["eval_loss"]
    assert came["evaluate"][0] == came["evaluate"][1]
    assert abs(came["evaluate"][0] - alone) < 4e-3 * alone


@pytest.mark.parametrize("stage", [1, 3])
def test_skipped_steps_move_nothing(came: Outcomes, stage: int) -> None:
    for rank in came[f"overflow-{stage}"]:
        assert 0 < rank["skipped"] < 12
        assert rank["scale"] == 2.0 ** (24 - rank["skipped"])
        assert rank["rates"][: rank["skipped"]] == [0.0] * rank["skipped"]
        assert rank["rates"][-1] > 0
