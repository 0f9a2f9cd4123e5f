"""transformers makes and loads models under a stage 3 config: sharded from the beginning, with the values of one process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from hf_models import MODELS, VOCABULARY
from standing import Reference, engine_for, micro_batches, torchs, values_of
from trainers import adapted_to, config, make, told, trainer

from hpc_ds import zero
from hpc_ds.compat import activate

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Outcomes
    from torch import nn

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]

STEPS, SAMPLES, PLACES, LARGER = 2, 12, 7, 29
CONFIG = {"train_micro_batch_size_per_gpu": 6, "zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def texts() -> torch.Tensor:
    """(steps, samples, places)."""
    return torch.randint(VOCABULARY, (STEPS, SAMPLES, PLACES), generator=torch.Generator().manual_seed(5))


def loss_of(model: Any, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text, labels=text).loss


def alive() -> Any:
    """A stage 3 config that transformers knows of as long as somebody holds it."""
    activate()
    from transformers.integrations import HfDeepSpeedConfig

    return HfDeepSpeedConfig(CONFIG)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    assert not any(parameter.numel() for parameter in model.parameters() if hasattr(parameter, "ds_id"))
    with zero.GatheredParameters(model.parameters()):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def loaded(rank: int, name: str, folder: Path, **asked: Any) -> nn.Module:
    """What rank 0 has saved, with other random numbers."""
    if rank == 0:
        make(name).save_pretrained(folder)
    dist.barrier()
    torch.manual_seed(5 + rank)
    model = type(make(name)).from_pretrained(folder, **asked)
    assert all(hasattr(parameter, "ds_id") for parameter in model.parameters())
    return model


def train(model: nn.Module) -> dict[str, Any]:
    model.train()
    engine = engine_for(3, model=model, optimizer={"type": "SGD", "params": SGD})
    losses = []
    for text in texts():
        (part,) = micro_batches(engine, text)
        losses.append(loss_of(engine, part))
        engine.backward(losses[-1])
        engine.step()
    return {"losses": [loss.item() for loss in losses], "values": values_of(engine)}


def load(rank: int, name: str, folder: Path) -> dict[str, Any]:
    held = alive()
    model = loaded(rank, name, folder)
    found = {"state": whole(model), **train(model)}
    del held
    return found


def load_in_bf16(rank: int, folder: Path) -> set[torch.dtype]:
    held = alive()
    model = loaded(rank, "llama", folder, dtype=torch.bfloat16)
    del held
    return {value.dtype for value in whole(model).values()}


def from_config(rank: int, name: str) -> dict[str, torch.Tensor]:
    held = alive()
    plain = make(name)
    torch.manual_seed(5 + rank)
    model = type(plain)._from_config(plain.config)
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    del held
    return whole(model)


def inside(_: int, name: str) -> dict[str, torch.Tensor]:
    """Without a config that transformers knows of."""
    with zero.Init():
        model = make(name)
    return whole(model)


def resize(rank: int, name: str, folder: Path) -> dict[str, Any]:
    held = alive()
    model = loaded(rank, name, folder)
    model.resize_token_embeddings(LARGER, mean_resizing=rank < 0)
    sizes = model.config.vocab_size, model.get_input_embeddings().num_embeddings
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    del held
    return {"sizes": sizes, "tied": tied, **train(model)}


def adapt(rank: int, folder: Path) -> dict[str, Any]:
    held = alive()
    model = adapted_to(loaded(rank, "llama", folder))
    del held
    counts = model.get_nb_trainable_parameters()
    return {"counts": counts, **train(model)}


def by_trainer(rank: int, folder: Path) -> dict[str, Any]:
    """A Trainer's run from a loaded model, and from one made whole; then each rank generates from what it has trained."""
    held = alive()
    model = loaded(rank, "gpt2", folder / "in")
    made = trainer("gpt2", folder / "out", config(3), model=model)
    del held
    made.train()
    made.save_model()
    text = torch.ones(1 + rank, 3 + rank, dtype=torch.long)
    generated = made.model.generate(text, max_new_tokens=2 + rank, do_sample=False, synced_gpus=True)
    whole_one = trainer("gpt2", folder / "whole", config(3))
    whole_one.train()
    return {"losses": told(made, "loss"), "wanted": told(whole_one, "loss"), "text": text, "generated": generated}


def far(found: dict[str, torch.Tensor], model: nn.Module) -> float:
    """The difference over the norm of the whole model."""
    named = {name: value.detach() for name, value in model.named_parameters()}
    difference = sum((found[name] - value).double().square().sum() for name, value in named.items())
    return float((difference / sum(value.double().square().sum() for value in named.values())).sqrt())


def plainly(model: nn.Module) -> Reference:
    made = Reference(torchs(torch.optim.SGD, **SGD), model=model.train(), parts=(2, 1), loss=loss_of)
    for text in texts():
        made.step(text)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_is_loaded_and_trains_as_in_one_process(came: Outcomes, name: str) -> None:
    wanted = make(name)
    state = {key: value.clone() for key, value in wanted.state_dict().items()}
    trained = plainly(wanted)
    ranks = came[f"load-{name}"]
    for rank in ranks:
        assert rank["state"].keys() == state.keys()
        assert [key for key, value in state.items() if not torch.equal(value, rank["state"][key])] == []
        assert far(rank["values"], wanted) < 1e-6
    for number, loss in enumerate(trained.losses):
        assert sum(rank["losses"][number] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-6)


def test_a_model_is_loaded_in_the_type_that_is_asked_for(came: Outcomes) -> None:
    assert came["load-in-bf16"] == [{torch.bfloat16}] * 2


@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_from_a_config_has_values_of_the_same_kind(came: Outcomes, name: str) -> None:
    first, second = came[f"config-{name}"]
    wanted = make(name).state_dict()
    assert first.keys() == second.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(first[key], second[key])
        if value.float().std(correction=0) == 0:  # a constant
            assert torch.equal(first[key], value), key
        else:
            assert float(first[key].float().std() / value.float().std()) == pytest.approx(1, abs=0.5), key


@pytest.mark.parametrize("name", MODELS)
def test_a_model_made_in_init_is_the_one_made_without(came: Outcomes, name: str) -> None:
    wanted = make(name).state_dict()
    for found in came[f"inside-{name}"]:
        assert [key for key, value in wanted.items() if not torch.equal(value, found[key])] == []


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_embeddings_are_resized(came: Outcomes, name: str) -> None:
    first, second = came[f"resize-{name}"]
    for rank in (first, second):
        assert rank["sizes"] == (LARGER, LARGER)
        assert rank["tied"] == (name == "gpt2")
        assert all(torch.equal(value, second["values"][key]) for key, value in rank["values"].items())
        shapes = {value.shape[0] for key, value in rank["values"].items() if "wte" in key or "embed_tokens" in key}
        assert shapes == {LARGER}


def test_adapters_on_a_sharded_model_train_as_in_one_process(came: Outcomes) -> None:
    wanted = adapted_to(make("llama"))
    counts = wanted.get_nb_trainable_parameters()
    plainly(wanted)
    for rank in came["adapt"]:
        assert rank["counts"] == counts
        assert far(rank["values"], wanted) < 1e-6


def test_a_trainer_trains_and_saves_a_loaded_model(came: Outcomes, folder: Path) -> None:
    trained = type(make("gpt2")).from_pretrained(folder / "by-trainer" / "out").eval()
    for rank in came["by-trainer"]:
        assert rank["losses"] == rank["wanted"]
        length = rank["generated"].shape[1] - rank["text"].shape[1]
        assert torch.equal(trained.generate(rank["text"], max_new_tokens=length, do_sample=False), rank["generated"])


def cases(folder: Path) -> dict[str, Any]:
    """What the ranks shall do, each in a folder of its own."""
    made: dict[str, Any] = {f"load-{name}": (load, (name, folder / f"load-{name}")) for name in MODELS}
    made |= {f"config-{name}": (from_config, (name,)) for name in MODELS}
    made |= {f"inside-{name}": (inside, (name,)) for name in MODELS}
    made |= {f"resize-{name}": (resize, (name, folder / f"resize-{name}")) for name in ("gpt2", "llama")}
    made["load-in-bf16"] = load_in_bf16, (folder / "load-in-bf16",)
    made["by-trainer"] = by_trainer, (folder / "by-trainer",)
    made["adapt"] = adapt, (folder / "adapt",)
    return made
