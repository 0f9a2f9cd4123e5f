"""``deepspeed.comm``, the optimizers of DeepSpeed's names and the weights of checkpoints, on two ranks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from standing import DECAY, RATE, Standing, advance, batches, config, distance, values_of

from hpc_ds import compat
from hpc_ds.compat import zero_to_fp32
from hpc_ds.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ranks


def deepspeed(name: str = "deepspeed") -> Any:
    compat.activate()
    return importlib.import_module(name)


def collectives(rank: int) -> dict[str, Any]:  # noqa: PLR0915 - one after the other
    """Called as DeepSpeed's own are, with what is for its log, and by its names of parameters."""
    comm = deepspeed("deepspeed.comm")
    log = {"prof": True, "log_name": "mine", "debug": "here"}
    mine = torch.arange(4.0) + 10 * rank
    whole, part = torch.empty(8), torch.empty(2)
    found: dict[str, Any] = {
        "rank": [comm.get_rank(), comm.get_world_size(), comm.get_local_rank(), comm.is_initialized()]
    }

    def keep(name: str, *tensors: torch.Tensor) -> None:
        found[name] = [tensor.tolist() for tensor in tensors]

    summed = mine.clone()
    comm.all_reduce(tensor=summed, op=comm.ReduceOp.SUM, **log)
    keep("all_reduce", summed)
    comm.all_gather_into_tensor(output_tensor=whole, tensor=mine, **log)
    keep("all_gather_into_tensor", whole)
    comm.reduce_scatter_tensor(output_tensor=part, tensor=mine, op=comm.ReduceOp.MAX, **log)
    keep("reduce_scatter_tensor", part)
    swapped = torch.empty(4)
    comm.all_to_all_single(output=swapped, tensor=mine, **log)
    keep("all_to_all_single", swapped)
    both = [torch.empty(4) for _ in range(2)]
    comm.all_gather(tensor_list=both, tensor=mine, **log)
    keep("all_gather", *both)
    told = [None, None]
    comm.all_gather_object(told, {"rank": rank}, **log)
    found["all_gather_object"] = told
    comm.broadcast(tensor=(first := mine.clone()), src=1, **log)
    keep("broadcast", first)
    one, two = torch.empty(8), torch.empty(2)
    handle = comm.all_gather_coalesced([one, two], [mine, mine[:1]], async_op=True)
    handle.wait()
    keep("all_gather_coalesced", one, two)
    comm.all_reduce_coalesced(pair := [mine.clone(), mine[:1].clone()])
    keep("all_reduce_coalesced", *pair)
    comm.monitored_barrier(**log)
    comm.barrier(**log)
    found["groups"] = [
        comm.get_all_ranks_from_group(comm.new_group([1])) if rank else None,
        comm.get_all_ranks_from_group(),
    ]
    found["global_rank"] = comm.get_global_rank(None, 1)
    found["counted"] = [comm.log_summary(return_dict=True), comm.has_comm_data(), comm.get_logged_comm_ops()]
    comm.new_group([1]) if not rank else None
    return found


def between_two(rank: int) -> list[Any]:
    """Both send first: with sends that wait, neither would get to receive."""
    comm = deepspeed("deepspeed.comm")
    other, arrived = 1 - rank, torch.empty(1 << 20)
    sent = torch.full((1 << 20,), float(rank))
    works = [comm.isend(sent, other, prof=False), comm.irecv(arrived, src=other)]
    for work in works:
        work.wait()
    again = torch.empty(3)
    operations = [comm.P2POp(comm.isend, torch.full((3,), float(rank)), other), comm.P2POp(comm.irecv, again, other)]
    for work in comm.batch_isend_irecv(operations):
        work.wait()
    if rank == 0:
        comm.send(sent[:2], 1, tag=3)
    else:
        comm.recv(again[:2], src=0, tag=3)
    return [arrived.unique().tolist(), again.tolist()]


def groups_of(rank: int) -> list[Any]:
    groups = deepspeed("deepspeed.utils.groups")
    return [
        dist.get_process_group_ranks(groups._get_data_parallel_group()),
        groups._get_data_parallel_rank() == rank,
        groups.get_model_parallel_world_size(),
        groups._get_sequence_parallel_group(),
    ]


# Where it is -> its name and parameters, and what a config says instead.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "FusedAdam": ("adam", {"lr": RATE, "weight_decay": DECAY}, {"type": "AdamW"}),
    "DeepSpeedCPUAdam": (
        "adam",
        {"lr": RATE, "weight_decay": DECAY, "adamw_mode": False},
        {"type": "Adam", "params": {"adam_w_mode": False}},
    ),
    "FusedAdam, uncorrected": (
        "adam",
        {"lr": RATE, "weight_decay": DECAY, "bias_correction": False},
        {"type": "AdamW", "params": {"bias_correction": False}},
    ),
    "DeepSpeedCPUAdagrad": ("adagrad", {"lr": RATE, "weight_decay": DECAY}, {"type": "Adagrad"}),
    "FusedLion": ("lion", {"lr": RATE, "weight_decay": DECAY}, {"type": "Lion"}),
    "DeepSpeedCPULion": ("lion", {"lr": RATE, "weight_decay": DECAY}, {"type": "Lion"}),
    "FusedLamb": ("lamb", {"lr": RATE, "weight_decay": DECAY}, {"type": "Lamb"}),
}
AT = [
    *[(name, 2) for name in OPTIMIZERS],
    *[(name, stage) for name in ("FusedAdam", "FusedLamb") for stage in (0, 1, 3)],
]


def trained_by(rank: int, name: str, stage: int) -> tuple[float, str]:
    """How far it is from what the config's own optimizer makes of the same, and its class."""
    folder, params, section = OPTIMIZERS[name]
    kind = getattr(deepspeed(f"deepspeed.ops.{folder}"), name.partition(",")[0])
    values, made = [], ""
    for client in (True, False):
        model = Standing(seed=1 + rank)
        told = {key: value for key, value in params.items() if key in {"lr", "weight_decay"}}
        settings = config(stage)
        given = None
        if client:
            del settings["optimizer"]
            given = kind([parameter for parameter in model.parameters() if parameter.requires_grad], **params)
        else:
            settings["optimizer"] = {"type": section["type"], "params": {**told, **section.get("params", {})}}
        engine, optimizer, *_ = deepspeed().initialize(model=model, optimizer=given, config=settings)
        for batch in batches():
            advance(engine, batch)
        values.append(values_of(engine))
        made = type(optimizer).__name__ if client else made
        assert not client or optimizer is given
    return distance(*values), made


def saved(rank: int, folder: str) -> dict[str, torch.Tensor]:
    """The values of a checkpoint of stage 3, in which each rank has a part."""
    engine, *_ = deepspeed().initialize(model=Standing(seed=1 + rank), config=config(3))
    advance(engine, batches()[0])
    engine.save_checkpoint(folder)
    return values_of(engine)


CASES: dict[str, Any] = {
    "collectives": (collectives, ()),
    "between two": (between_two, ()),
    "groups": (groups_of, ()),
    **{f"{name} at {stage}": (trained_by, (name, stage)) for name, stage in AT},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Outcomes:
    return run_cases(2, {**CASES, "saved": (saved, (str(folder),))})


def test_collectives_are_torchs_under_deepspeeds_names(pair: Outcomes) -> None:
    for rank, found in enumerate(pair["collectives"]):
        counted = found.pop("counted")
        assert counted == [{}, False, []]
        assert found == {
            "rank": [rank, 2, rank, True],
            "all_reduce": [[10.0, 12.0, 14.0, 16.0]],
            "all_gather_into_tensor": [[0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]],
            "reduce_scatter_tensor": [[[10.0, 11.0], [12.0, 13.0]][rank]],
            "all_to_all_single": [[[0.0, 1.0, 10.0, 11.0], [2.0, 3.0, 12.0, 13.0]][rank]],
            "all_gather": [[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]],
            "all_gather_object": [{"rank": 0}, {"rank": 1}],
            "broadcast": [[10.0, 11.0, 12.0, 13.0]],
            "all_gather_coalesced": [[0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0], [0.0, 10.0]],
            "all_reduce_coalesced": [[10.0, 12.0, 14.0, 16.0], [10.0]],
            "groups": [[1] if rank else None, [0, 1]],
            "global_rank": 1,
        }


def test_sends_that_return_at_once_do(pair: Outcomes) -> None:
    assert pair["between two"] == [[[1.0], [1.0] * 3], [[0.0], [0.0] * 3]]


def test_all_ranks_share_the_data(pair: Outcomes) -> None:
    assert pair["groups"] == [[[0, 1], True, 1, None]] * 2


@pytest.mark.parametrize(("name", "stage"), AT)
def test_an_optimizer_of_deepspeeds_trains_as_the_config_s(name: str, stage: int, pair: Outcomes) -> None:
    for far, made in pair[f"{name} at {stage}"]:
        assert far < 1e-6
        assert made == {"FusedAdam, uncorrected": "UncorrectedAdam"}.get(name, name)


def test_weights_of_our_checkpoint_are_whole_by_deepspeeds_functions(pair: Outcomes, folder: Path) -> None:
    wanted = pair["saved"][0]
    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder)
    assert found.keys() == {*Standing().state_dict()}  # the names of the tied one included
    assert [name for name in found if name in wanted and not torch.equal(found[name], wanted[name])] == []
    assert found["head.weight"] is found["tokens.weight"]
    lazy = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
        folder, tag="global_step1", exclude_frozen_parameters=True, lazy_mode=True
    )
    assert found.keys() - lazy.keys() == {"frozen.weight", "frozen.bias"}
    assert torch.equal(lazy["blocks.0.gain"].contiguous(), found["blocks.0.gain"])
    assert (lazy["mask"].shape, lazy["mask"].dtype) == (torch.Size([5]), torch.bool)
    loaded = zero_to_fp32.load_state_dict_from_zero_checkpoint(Standing(seed=9), folder).state_dict()
    assert [name for name in found if not torch.equal(loaded[name], found[name])] == []


def test_a_command_line_writes_the_weights(pair: Outcomes, folder: Path, tmp_path: Path) -> None:
    assert pair["saved"]
    zero_to_fp32.main([str(folder), str(tmp_path), "--exclude_frozen_parameters", "-d"])
    found = torch.load(tmp_path / "pytorch_model.bin")
    assert "frozen.weight" not in found
    assert torch.equal(found["head.weight"], pair["saved"][0]["tokens.weight"])
    with pytest.raises(ConfigError, match="dtype 'int8': not one to write; use bf16,"):
        zero_to_fp32.convert_zero_checkpoint_to_state_dict(folder, tmp_path, dtype="int8")
    with pytest.raises(CheckpointError, match="no such folder"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder / "nothing")
    with pytest.raises(CheckpointError, match="it has no 'global_step9'"):
        zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(folder, tag="global_step9")


def test_what_a_user_can_mend_of_a_command_line_is_one_line(
    pair: Outcomes, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pair["saved"]
    file = tmp_path / "file"
    file.touch()
    lines = {
        (str(tmp_path), str(tmp_path)): (4, f"checkpoint {str(tmp_path)!r}: "),
        (str(folder), str(tmp_path), "-t", "none"): (4, f"checkpoint {str(folder)!r}: it has no 'none'"),
        (str(folder), str(tmp_path), "--max_shard_size=x"): (2, "max_shard_size 'x': "),
        (str(folder), str(file)): (4, f"zero_to_fp32: {str(file)!r}: File exists; look at that folder"),
    }
    for words, (code, line) in lines.items():
        with pytest.raises(SystemExit) as ended:
            zero_to_fp32.main([*words])
        said = capsys.readouterr().err
        assert (ended.value.code, said.count("\n")) == (code, 1), said
        assert said.startswith("zero_to_fp32: ")
        assert line in said
