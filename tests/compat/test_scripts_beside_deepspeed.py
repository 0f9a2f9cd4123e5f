"""Scripts that say ``import deepspeed``, run by the real one and by ours: same losses, same files, same answers.

One start of each side, on two ranks, does all of it (beside_deepspeed.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import beside_deepspeed
import face_of_engine
import pytest
from deepspeed_peer import FOR_EVERY_RANK, FOREIGN_PREFIXES, REPOSITORY, run_deepspeed

from hpc_ds.engine.lacking import LACKING

pytestmark = pytest.mark.ranks

WORLD_SIZE = 2
EXAMPLES = REPOSITORY / "examples" / "deepspeed_script"

# Where ours is another on purpose (docs/migrating-from-deepspeed.md) -> the real one's, ours.
DIFFERENT = {
    # There is a loss scale in fp16 only.
    ("answers", "plain", "dynamic_loss_scale"): (True, False),
    ("answers", "rich", "dynamic_loss_scale"): (True, False),
    # Whole weights can always be gathered.
    ("answers", "plain", "zero_gather_16bit_weights_on_model_save"): (False, True),
    ("answers", "rich", "zero_gather_16bit_weights_on_model_save"): (False, True),
    # A typing error is told, not passed over.
    ("configs", "an unknown key"): ("taken", "refused"),
    # An engine that only evaluates may say any stage, and Rprop is right on ranges of parameters.
    ("configs", "no optimizer at stage 1"): ("refused", "taken"),
    ("configs", "an untested optimizer"): ("refused", "taken"),
    # What is written to a master is seen by the next forward, not by the one after the next step.
    **{("stages", f"stage {stage}", "fragments", "at once"): (False, True) for stage in (1, 2, 3)},
}


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the real one says, by rank."""
    payload = {"examples": str(EXAMPLES), "folder": str(tmp_path_factory.mktemp("its"))}
    return run_deepspeed(Path(beside_deepspeed.__file__), WORLD_SIZE, payload)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What ours says to the same files, by rank."""
    folder = tmp_path_factory.mktemp("ours")
    (folder / "payload.json").write_text(json.dumps({"examples": str(EXAMPLES), "folder": str(folder)}))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
    environment |= FOR_EVERY_RANK | {"PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": str(WORLD_SIZE)}
    command = [sys.executable, "-m", "hpc_ds.compat", sys.executable, beside_deepspeed.__file__, str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD_SIZE)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * WORLD_SIZE, "\n".join(text[-4000:] for text in said)
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("script", beside_deepspeed.SCRIPTS)
def test_the_losses_of_a_script_agree(deepspeed: list[dict[str, Any]], ours: list[dict[str, Any]], script: str) -> None:
    for start in (0, 1):
        its, own = ([rank["scripts"][script]["told"][start]["losses"] for rank in side] for side in (deepspeed, ours))
        if script == "cifar":  # its loaders draw the same batch in another order: another half on each rank
            its, own = ([[sum(step) / WORLD_SIZE for step in zip(*side, strict=True)]] for side in (its, own))
        assert len(own[0]) == len(its[0]) > 0
        for found, wanted in zip(own, its, strict=True):
            assert found == pytest.approx(wanted, rel=1e-3)
    assert min(own[0]) < max(its[0])


@pytest.mark.parametrize("script", beside_deepspeed.SCRIPTS)
def test_what_a_script_sees_and_leaves_behind_agrees(
    deepspeed: list[dict[str, Any]], ours: list[dict[str, Any]], script: str
) -> None:
    for its, own in zip(deepspeed, ours, strict=True):
        wanted, found = its["scripts"][script], own["scripts"][script]
        for start in [*wanted["told"], *found["told"]]:
            del start["losses"]
        weights, own_weights = wanted.pop("exported"), found.pop("exported")
        assert list(differences(wanted, found)) == []
        # Adam makes whole steps of what bf16 rounds: the norm of a bias that has hardly a gradient is another.
        assert list(differences(weights, own_weights, rel=0.05)) == []
        assert wanted["told"][1]["first"] > 0  # the second start went on from the first


@pytest.mark.parametrize("what", ["answers", "configs", "stages"])
def test_engines_answer_alike(deepspeed: list[dict[str, Any]], ours: list[dict[str, Any]], what: str) -> None:
    expected = {at: values for at, values in DIFFERENT.items() if at[0] == what}
    for its, own in zip(deepspeed, ours, strict=True):
        found = {at: values for at, *values in differences(its[what], own[what], (what,))}
        hidden = {at for at in found if at[-2:-1] == ("hidden",)}  # see the next test
        assert {at: tuple(values) for at, values in found.items() if at not in hidden} == expected
        assert set(its["configs"].values()) == {"taken", "refused"}


def test_a_checkpoint_is_found_though_no_latest_names_one(
    deepspeed: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> None:
    """A kill between the checkpoint and ``latest`` would else cost the run."""
    for stage in face_of_engine.STAGES:
        for its, own in zip(deepspeed, ours, strict=True):
            path, client = own["stages"][f"stage {stage}"]["saves"]["hidden"]
            assert its["stages"][f"stage {stage}"]["saves"]["hidden"] == [None, None]
            assert (Path(path).name, client) == ("hidden", {"at": 1})


def test_every_name_of_its_engine_is_there_or_says_why_not(
    deepspeed: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> None:
    its, own = set(deepspeed[0]["names"]), set(ours[0]["names"])
    assert its - own - set(LACKING) == set()
    assert own & set(LACKING) == set()
    assert len(its & own) > 130


def differences(wanted: Any, found: Any, at: tuple[Any, ...] = (), rel: float = 2e-3) -> Any:
    """Where two JSON values differ by more than bf16's rounding: the place and both."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted(wanted.keys() | found.keys()):
            yield from differences(wanted.get(key, "missing"), found.get(key, "missing"), (*at, key), rel)
    elif isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        for index, (one, other) in enumerate(zip(wanted, found, strict=True)):
            yield from differences(one, other, (*at, index), rel)
    elif isinstance(wanted, float) and isinstance(found, float):
        if found != pytest.approx(wanted, rel=rel, abs=1e-3):
            yield at, wanted, found
    elif wanted != found:
        yield at, wanted, found
