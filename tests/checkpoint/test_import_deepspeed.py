"""Real DeepSpeed checkpoints become ours to the bit, and the training goes on as DeepSpeed's own does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed_saves
import pytest
import torch
from deepspeed_peer import run_deepspeed
from deepspeed_saves import STEPS
from ranks import run_ranks
from safetensors.torch import load_file

import hpc_ds
from hpc_ds.checkpoint.export import export_safetensors, export_torch
from hpc_ds.checkpoint.import_deepspeed import import_deepspeed as run_import
from hpc_ds.checkpoint.verify import damages, open_whole
from hpc_ds.compat import zero_to_fp32
from hpc_ds.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.ranks

SCRIPT = Path(deepspeed_saves.__file__)

# What differs between the ways in which DeepSpeed writes.
ON_TWO: dict[str, dict[str, Any]] = {
    "0-fp32": {"stage": 0, "type": "fp32", "groups": "decay", "all_train": True},
    "0-fp32-frozen": {"stage": 0, "type": "fp32"},
    "0-bf16": {"stage": 0, "type": "bf16", "groups": "decay"},
    "0-fp16": {"stage": 0, "type": "fp16"},
    "1-bf16": {"stage": 1, "type": "bf16", "groups": "decay"},
    "1-bf16-accumulating": {
        "stage": 1,
        "type": "bf16",
        "more": {"data_types": {"grad_accum_dtype": "fp32"}},
    },
    "1-fp32-elastic": {"stage": 1, "type": "fp32", "groups": "small", "zero": {"elastic_checkpoint": True}},
    "1-bf16-aligned": {"stage": 1, "type": "bf16", "zero": {"parameter_alignment": True}},
    "2-fp16": {"stage": 2, "type": "fp16", "groups": "small"},
    "2-fp32": {"stage": 2, "type": "fp32", "groups": "decay"},
    "2-bf16-round-robin": {"stage": 2, "type": "bf16", "zero": {"round_robin_gradients": True}},
    "2-fp32-sgd": {"stage": 2, "type": "fp32", "optimizer": "SGD"},
    "3-bf16": {"stage": 3, "type": "bf16", "groups": "decay", "zero": {"stage3_param_persistence_threshold": 0}},
    "3-fp32-sub-groups": {"stage": 3, "type": "fp32", "groups": "small", "zero": {"sub_group_size": 60}},
    "3-fp16": {"stage": 3, "type": "fp16"},
}
ON_THREE = {name: ON_TWO[name] for name in ("1-bf16", "2-fp16", "3-fp16", "3-fp32-sub-groups")}
ON_ONE = {name: ON_TWO[name] for name in ("0-fp32", "1-bf16", "2-fp16", "3-bf16")}
CASES = [(world, name) for world, cases in ((2, ON_TWO), (3, ON_THREE), (1, ON_ONE)) for name in cases]
AMBIGUOUS = "0-fp32-frozen"  # whose frozen layer has the shape of trained ones
DAMAGED_BY_DEEPSPEED = "2-bf16-round-robin"  # what it tells of itself is wrong there
NOT_TOLD = {DAMAGED_BY_DEEPSPEED, "1-bf16-accumulating"}  # nor does its zero_to_fp32 read the other


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, list[dict[str, list[float]]]]]:
    """World size -> where DeepSpeed saved, and by rank the losses of each case when it went on."""
    found = {}
    for world, cases in ((2, ON_TWO), (3, ON_THREE), (1, ON_ONE)):
        folder = tmp_path_factory.mktemp(f"deepspeed-{world}")
        found[world] = (folder, run_deepspeed(SCRIPT, world, {"folder": str(folder), "cases": cases}))
    return found


@pytest.mark.parametrize(("world", "name"), [case for case in CASES if case[1] != AMBIGUOUS])
def test_masters_and_optimizer_state_are_those_of_deepspeed_to_the_bit(
    saves: dict[int, Any], tmp_path: Path, world: int, name: str
) -> None:
    folder = saves[world][0]
    path = run_import(folder / name, tmp_path)
    stored = open_whole(path)
    assert damages(stored) == []
    assert (stored.tag, stored.step, stored.saved.stage) == ("global_step3", STEPS, ON_TWO[name]["stage"])
    found, truth = load_file(path / "rank-0.safetensors"), torch.load(folder / f"{name}.truth")
    model = deepspeed_saves.model(ON_TWO[name])
    assert {key.removeprefix("model.") for key in found if key.startswith("model.")} == {
        *dict(model.named_parameters()), *dict(model.named_buffers()),
    }  # fmt: skip
    assert truth.keys() == {key for key, value in model.named_parameters() if value.requires_grad}
    for key, of in truth.items():
        assert found[f"model.{key}"].dtype == torch.float32
        if ON_TWO[name].get("optimizer") != "SGD":
            # Its optimizer of 16-bit weights at stage 0 takes a step without gradients when it is made.
            assert found[f"optimizer.{key}.step"].item() == STEPS + (name in {"0-bf16", "0-fp16"})
        if name == DAMAGED_BY_DEEPSPEED:
            continue
        assert torch.equal(found[f"model.{key}"], of.pop("master")), key
        for state, value in of.items():
            assert torch.equal(found[f"optimizer.{key}.{state}"], value), (key, state)
    frozen = found["model.frozen.weight"]
    assert name == "0-fp32" or torch.equal(frozen, model.frozen.weight.detach().to(frozen.dtype))
    assert torch.equal(found["model.factor"].float(), model.factor)


ITS_TOOL_READS = [
    name for name, case in ON_TWO.items() if case["stage"] and "more" not in case and name != DAMAGED_BY_DEEPSPEED
]


@pytest.mark.parametrize("name", ITS_TOOL_READS)
def test_what_is_exported_is_what_zero_to_fp32_gives(saves: dict[int, Any], tmp_path: Path, name: str) -> None:
    """Same names, tied ones included, and the same values to the bit, in both formats; at stage 1 its tool loses the frozen."""
    folder = saves[2][0]
    stored = open_whole(run_import(folder / name, tmp_path / "ours"))
    wanted = torch.load(folder / f"{name}.fp32")
    export_torch(stored, tmp_path / "pytorch_model.bin", "F32")
    export_safetensors(stored, tmp_path / "safe", "F32", 5_000_000_000)
    for found in (torch.load(tmp_path / "pytorch_model.bin"), load_file(tmp_path / "safe" / "model.safetensors")):
        lost = {"frozen.weight", "frozen.bias"} if ON_TWO[name]["stage"] == 1 else set()
        assert (found.keys() - wanted.keys(), wanted.keys() - found.keys()) == (lost, set())
        assert [key for key, value in wanted.items() if not torch.equal(found[key], value.float())] == []


def test_a_checkpoint_of_the_trainer_is_imported_where_it_lies(saves: dict[int, Any], tmp_path: Path) -> None:
    """``out/checkpoint-3`` holds the tag, ``latest``, weights and the Trainer's own state, side by side."""
    theirs = tmp_path / "out" / "checkpoint-3"
    shutil.copytree(saves[2][0] / "3-bf16", theirs)
    for name in ("trainer_state.json", "config.json", "model.safetensors", "rng_state_0.pth", "scheduler.pt"):
        (theirs / name).write_text("{}")
    assert open_whole(run_import(theirs, tmp_path / "ours")).step == STEPS
    with pytest.raises(CheckpointError, match="it has no file 'latest'; say which with --tag"):
        run_import(theirs.parent, tmp_path / "ours")


def test_round_robin_masters_are_those_of_the_weights(saves: dict[int, Any], tmp_path: Path) -> None:
    """With round_robin_gradients DeepSpeed 0.19.8 itself tells wrong masters; those imported round to the weights."""
    folder = saves[2][0] / DAMAGED_BY_DEEPSPEED
    found = load_file(run_import(folder, tmp_path) / "rank-0.safetensors")
    weights = torch.load(folder / "global_step3" / "mp_rank_00_model_states.pt")["module"]
    truth = torch.load(saves[2][0] / f"{DAMAGED_BY_DEEPSPEED}.truth")
    assert [name for name in truth if not torch.equal(found[f"model.{name}"].bfloat16(), weights[name])] == []
    assert [name for name in truth if not torch.equal(truth[name]["master"].bfloat16(), weights[name])] != []


def test_counters_schedule_scale_and_client_state_come_along(saves: dict[int, Any], tmp_path: Path) -> None:
    for name in ("0-fp16", "2-fp16", "3-fp16"):
        stored = open_whole(run_import(saves[2][0] / name, tmp_path / name))
        state = stored.state
        assert (state["global_steps"], state["global_samples"], state["skipped_steps"]) == (STEPS, 2 * STEPS, 0)
        assert state["tied"] == {"head.weight": "embed.weight"}
        scale = state["loss_scale"]
        assert (scale["value"], scale["iteration"], scale["last_overflow"]) == (64.0, STEPS, -1)
        assert scale["hysteresis"] == (1 if name == "0-fp16" else 2)  # stage 0 has none
        assert stored.saved.client_state["client"] == {
            "epoch": 3, "seen": {"<tensor>": 0}, "nested": {"a": [1.5, {"<tuple>": [2, None]}]},
        }  # fmt: skip
        assert stored.saved.client_state["lr_scheduler"]["schedule"] == {"last_batch_iteration": 2}
        assert stored.saved.versions["deepspeed"] == "0.19.8"


@pytest.mark.parametrize("name", [name for name in ON_TWO if ON_TWO[name]["stage"] and name not in NOT_TOLD])
def test_weights_are_those_that_deepspeeds_zero_to_fp32_gives(saves: dict[int, Any], name: str) -> None:
    """By the functions of that name, of the package that stands for DeepSpeed."""
    folder = saves[2][0]
    theirs = torch.load(folder / f"{name}.fp32")
    ours = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder / name)
    # At stage 1 it forgets the frozen ones, and at others it leaves them in 16 bits.
    assert ours.keys() == theirs.keys() | {"frozen.weight", "frozen.bias"}
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key].float())] == []
    assert {value.dtype for value in ours.values()} == {torch.float32}
    assert ours["head.weight"] is ours["embed.weight"]
    trained = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder / name, exclude_frozen_parameters=True)
    assert ours.keys() - trained.keys() == {"frozen.weight", "frozen.bias"}


def test_weights_of_a_deepspeed_checkpoint_become_files(saves: dict[int, Any], tmp_path: Path) -> None:
    folder = saves[2][0] / "3-bf16"
    theirs = torch.load(f"{folder}.fp32")
    (tmp_path / "other").write_text("stays")
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(folder, tmp_path, tag="global_step3")
    zero_to_fp32.convert_zero_checkpoint_to_state_dict(
        folder, tmp_path, dtype="bf16", max_shard_size="400B", safe_serialization=True, exclude_frozen_parameters=True
    )
    found = torch.load(tmp_path / "pytorch_model.bin")
    assert {key: torch.equal(found[key], theirs[key]) for key in theirs} == dict.fromkeys(theirs, True)
    parts = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({*parts.values()}) == 2
    assert theirs.keys() - parts.keys() == {"frozen.weight", "frozen.bias"}
    assert torch.equal(load_file(tmp_path / parts["gain"])["gain"], theirs["gain"].bfloat16())
    assert (tmp_path / "other").read_text() == "stays"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    net = zero_to_fp32.load_state_dict_from_zero_checkpoint(deepspeed_saves.Net(), folder)
    assert {key: torch.equal(value, theirs[key]) for key, value in net.state_dict().items()} == dict.fromkeys(
        theirs, True
    )


def continued(rank: int, folder: str, cases: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Losses of our engine after it took up what was imported."""
    found = {}
    for name, case in cases.items():
        net = deepspeed_saves.model(case)
        engine, *_ = hpc_ds.initialize(
            model=net, optimizer=deepspeed_saves.optimizer(net, case), config=deepspeed_saves.config(case)
        )
        path, client = engine.load_checkpoint(f"{folder}/{name}")
        assert path == f"{folder}/{name}/global_step3"
        assert client["epoch"] == 3
        assert client["nested"] == {"a": [1.5, (2, None)]}
        assert torch.equal(client["seen"], torch.arange(4))
        assert engine.global_steps == STEPS
        found[name] = [step(engine, number, rank) for number in range(STEPS, 2 * STEPS)]
    return found


def step(engine: Any, number: int, rank: int) -> float:
    loss = engine(*deepspeed_saves.batch(number, rank))
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


@pytest.mark.parametrize("world", [2, 3, 1])
def test_training_goes_on_as_deepspeed_does(saves: dict[int, Any], tmp_path: Path, world: int) -> None:
    """Losses of every rank and step, within 1e-3; and these differ by much more from step to step.

    At stage 0 DeepSpeed averages bf16 gradients in bf16. Those of fp16 it divides there by a loss scale that it never
    multiplied the loss by, so what goes on without that mistake is another training.
    """
    folder, theirs = saves[world]
    cases = {name: ON_TWO[name] for of, name in CASES if of == world and name not in {AMBIGUOUS, "0-fp16"}}
    for name in cases:
        run_import(folder / name, tmp_path / name)
    ours = run_ranks(continued, world, str(tmp_path), cases)
    apart = {
        (name, rank): max(abs(a - b) for a, b in zip(ours[rank][name], theirs[rank][name], strict=True))
        for name in cases
        for rank in range(world)
    }
    assert {key: value for key, value in apart.items() if value > (2e-3 if key[0] == "0-bf16" else 1e-3)} == {}
    assert all(abs(losses[0] - losses[2]) > 1e-2 for of_rank in theirs for losses in of_rank.values())


# what is refused


def test_what_cannot_be_told_is_not_guessed(saves: dict[int, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it does not say which parameter is which; save it once at ZeRO stage 1"):
        run_import(saves[2][0] / AMBIGUOUS, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def save(saves: dict[int, Any], tmp_path: Path) -> Path:
    """A copy of a save to spoil."""
    return Path(shutil.copytree(saves[2][0] / "3-bf16", tmp_path / "save"))


MODEL, STATES = "zero_pp_rank_{}_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def lose(name: str) -> Callable[[Path], object]:
    return lambda tag: (tag / name).unlink()


def add(name: str) -> Callable[[Path], object]:
    return lambda tag: (tag / name).write_bytes(b"")


def change(name: str, how: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def rewrite(tag: Path) -> None:
        data = torch.load(tag / name, weights_only=True)
        how(data)
        torch.save(data, tag / name)

    return rewrite


def truncate(tag: Path) -> None:
    path = tag / STATES.format(1)
    path.write_bytes(path.read_bytes()[:-40])


def misplace(data: dict[str, Any]) -> None:
    data["param_shapes"][0]["embed.weight"] = torch.Size([12, 7])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no states of rank 0": (lose(STATES.format(0)), "the file of rank 0 is missing; is it complete?"),
    "no states of rank 1": (lose(STATES.format(1)), "1 optimizer files of 2 ranks are there; is it complete?"),
    "no model of rank 1": (lose(MODEL.format(1)), "2 optimizer files of 2 ranks are there; is it complete?"),
    "states cut short": (truncate, "refused: it is damaged: "),
    "experts": (add("layer_0_expert_1_mp_rank_00_model_states.pt"), "is of tensor, pipeline or expert parallelism"),
    "tensor parallel": (
        add("zero_pp_rank_0_mp_rank_01_model_states.pt"),
        "is of tensor, pipeline or expert parallelism",
    ),
    "pipeline": (add("layer_00-model_00-model_states.pt"), "is of tensor, pipeline or expert parallelism"),
    "other shapes": (change(MODEL.format(0), misplace), "does not fit its shape|flat groups"),
    "swapped to NVMe": (add("offloaded_tensors"), "its optimizer state is swapped to NVMe"),
    "no shapes": (
        change(MODEL.format(0), lambda data: data.pop("param_shapes")),
        "not arranged as DeepSpeed 0.19 does it",
    ),
    "no model states": (change(MODEL.format(0), dict.clear), "not what DeepSpeed writes"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_what_is_not_whole_is_refused_and_leaves_nothing(save: Path, tmp_path: Path, what: str) -> None:
    spoil, message = SPOILED[what]
    spoil(save / "global_step3")
    with pytest.raises(CheckpointError, match=message):
        run_import(save, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Malicious:
    """Would make a folder when it is loaded with pickle."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.target,)


def test_code_in_a_file_does_not_run(save: Path, tmp_path: Path) -> None:
    target = tmp_path / "it ran"
    change(MODEL.format(0), lambda data: data.update(args=Malicious(target)))(save / "global_step3")
    with pytest.raises(CheckpointError, match="getattr is not among the types that are read from a file"):
        run_import(save, tmp_path / "ours")
    assert not target.exists()
    torch.load(save / "global_step3" / MODEL.format(0), weights_only=False)
    assert target.is_dir()  # it would have


def test_the_tag_is_found_or_named(save: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours"
    with pytest.raises(CheckpointError, match="it has no 'other'; give the name of a folder in it"):
        run_import(save, ours, "other")
    (save / "global_step3").rename(save / "other")
    with pytest.raises(CheckpointError, match="no files of DeepSpeed's in 'global_step3'; say which with --tag"):
        run_import(save, ours)
    assert run_import(save, ours, "other") == ours / "other"
    assert (ours / "latest").read_text() == "other"
    with pytest.raises(ConfigError, match="already there; choose another folder"):
        run_import(save, ours, "other")
    (save / "other").rename(save / "newer")
    assert run_import(save / "newer", ours) == ours / "newer"
    assert (ours / "latest").read_text() == "other"  # what is there already stays what a resume takes


def test_the_command_imports_without_torch(save: Path, tmp_path: Path) -> None:
    program = """
import sys
from hpc_ds.cli.entry import main
try:
    main()
except SystemExit as end:
    assert not end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "checkpoint", "import-deepspeed", str(save), str(tmp_path / "ours"), "--json"],
        cwd=tmp_path, env={"PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["checkpoint"] == str(tmp_path / "ours" / "global_step3")
    assert (told["step"], told["zero_stage"]) == (STEPS, 3)
    assert told["bytes"] == open_whole(tmp_path / "ours" / "global_step3").saved.size_bytes
