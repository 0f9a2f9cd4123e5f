"""A DeepSpeed checkpoint on disk: which files it has, and what is in them, read without DeepSpeed and without torch.

| ZeRO stage | weights                                             | optimizer                                     |
|------------|-----------------------------------------------------|-----------------------------------------------|
| 0          | mp_rank_00_model_states.pt                          | in the same file                              |
| 1, 2       | the same                                            | [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt |
| 3          | zero_pp_rank_R_mp_rank_00_model_states.pt           | the same                                      |

Source: DeepSpeed 0.19.8, runtime/engine.py (_get_ckpt_name, _get_zero_ckpt_name, _save_checkpoint)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint.torch_file import Record, load
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_WHOLE = "mp_rank_00_model_states.pt"
_MODEL = re.compile(r"zero_pp_rank_(\d+)_mp_rank_00_model_states\.pt")
_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
_SWAPPED = "offloaded_tensors"
# Parallelism that cuts tensors in ways that are not read here.
_OTHER = re.compile(r"layer_\d+.*|.*_expert_\d+_.*|expp_rank_.*|.*mp_rank_(?!00)\d\d_.*")


@dataclass(frozen=True, slots=True)
class DeepSpeedCheckpoint:
    """What stands in the files of one tag.

    Attributes:
        path: folder of the tag.
        model: of each rank at stage 3, else of rank 0.
        optimizer: ``optimizer_state_dict`` of each rank; none at stage 0.
        stage: of ZeRO.
    """

    path: Path
    model: list[dict[str, Any]]
    optimizer: list[dict[str, Any]]
    stage: int

    @property
    def tag(self) -> str:
        """The name it was saved under."""
        return self.path.name


def tag_folder(source: Path, tag: str | None) -> Path:
    """The folder of the tag asked for: ``source`` is it, or holds it; without a tag the one that ``latest`` names.

    Raises:
        CheckpointError: there is none.
    """
    what = f"DeepSpeed checkpoint {str(source)!r}"
    if not source.is_dir():
        raise CheckpointError(f"{what}: no such folder; give the one that save_checkpoint was given", str(source))
    if tag is not None and (tag in {".", ".."} or "/" in tag or not (source / tag).is_dir()):
        raise CheckpointError(f"{what}: it has no {tag!r}; give the name of a folder in it", str(source))
    if tag is None and _has_files(source):
        return source.resolve()
    if tag is None:
        try:
            tag = (source / "latest").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"{what}: it has no file 'latest'; say which with --tag", str(source)) from None
    found = source / tag
    if "/" in tag or not _has_files(found):
        raise CheckpointError(f"{what}: no files of DeepSpeed's in {tag!r}; say which with --tag", str(source))
    return found


def read(path: Path) -> DeepSpeedCheckpoint:
    """Read the files of one tag; tensors stay where they are.

    Raises:
        CheckpointError: files are missing or damaged, hold code, or are of a kind of parallelism that is not read.
    """
    names = sorted(file.name for file in path.iterdir())
    for name in names:
        if _OTHER.fullmatch(name):
            raise _refused(
                path, f"{name} is of tensor, pipeline or expert parallelism; convert it with DeepSpeed's tools"
            )
    if _SWAPPED in names:
        raise _refused(
            path, "its optimizer state is swapped to NVMe; save it once without offload to nvme and import that"
        )
    models = [_WHOLE] if _WHOLE in names else _of_ranks(path, names, _MODEL)
    model = [_dictionary(path / name, load(path / name), {"module", "global_steps"}) for name in models]
    optimizer = [
        _dictionary(path / name, _inner(load(path / name)), {"partition_count"} if _WHOLE not in names else set())
        for name in _of_ranks(path, names, _OPTIMIZER)
    ]
    if model[0].get("mp_world_size", 1) != 1:
        raise _refused(path, "it is of a tensor-parallel run; convert it with DeepSpeed's tools")
    stage = 3 if _WHOLE not in names else _stage(optimizer)
    _check_ranks(path, model, optimizer, stage)
    return DeepSpeedCheckpoint(path, model, optimizer, stage)


def _has_files(folder: Path) -> bool:
    return folder.is_dir() and any(file.name.endswith("_model_states.pt") for file in folder.iterdir())


def _of_ranks(path: Path, names: list[str], pattern: re.Pattern[str]) -> list[str]:
    """The files of one kind by rank; none may be missing in between."""
    by_rank = {int(match[1]): name for name in names if (match := pattern.fullmatch(name))}
    missing = set(range(max(by_rank, default=-1) + 1)) - by_rank.keys()
    if missing:
        raise _refused(path, f"the file of rank {min(missing)} is missing; is it complete?")
    return [by_rank[rank] for rank in sorted(by_rank)]


def _check_ranks(path: Path, model: list[dict[str, Any]], optimizer: list[dict[str, Any]], stage: int) -> None:
    wanted = model[0].get("dp_world_size")
    if stage and any(count != wanted for count in (len(optimizer), len(model) if stage == 3 else wanted)):
        raise _refused(path, f"{len(optimizer)} optimizer files of {wanted} ranks are there; is it complete?")
    if stage and any(_stage([states]) != _stage(optimizer) for states in optimizer):
        raise _refused(path, "its ranks were saved at several ZeRO stages")


def _stage(optimizer: list[dict[str, Any]]) -> int:
    if not optimizer:
        return 0
    stage = optimizer[0].get("zero_stage", 1)  # BF16_Optimizer says none, and partitions as stage 1 does
    return int(stage.made_of[0]) if isinstance(stage, Record) and stage.made_of else int(stage)


def _inner(states: Any) -> Any:
    return states.get("optimizer_state_dict") if isinstance(states, dict) else None


def _dictionary(path: Path, data: Any, keys: set[str]) -> dict[str, Any]:
    if not isinstance(data, dict) or not keys <= data.keys():
        raise CheckpointError(f"file {str(path)!r}: not what DeepSpeed writes; is it another program's?", str(path))
    return data


def _refused(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"DeepSpeed checkpoint {str(path)!r}: {problem}", str(path))
