"""``hpcds checkpoint``: each verb for people and for programs, its exit codes, and that none of them loads torch."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from whole_runs import Runs

from hpc_ds.checkpoint import writer
from hpc_ds.checkpoint.shards import own_share

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(
        tmp_path, {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    )


def weights(step: int) -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.arange(6.0).reshape(2, 3) + step,
        "model.b": torch.tensor([1, 2]),
        "optimizer.a.m": torch.ones(2, 3),
    }


def save(folder: Path, step: int, tensors: dict[str, torch.Tensor] | None = None, **options: Any) -> Path:
    """A checkpoint of two ranks."""

    def of_rank(rank: int) -> writer.Content:
        shards = [own_share(name, tensor, rank, 2) for name, tensor in (tensors or weights(step)).items()]
        return writer.Content(shards, {"r": rank}, {"x": torch.ones(1)}, {}, step, stage=2)

    return writer.save_in_turn(folder, f"step{step}", (of_rank(rank) for rank in range(2)), 2, **options)


def checkpoint(runs: Runs, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = runs.hpcds("checkpoint", *words, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def told(runs: Runs, *words: str, code: int = 0) -> Any:
    return json.loads(checkpoint(runs, *words, "--json", code=code).stdout)


def flip(path: Path, place: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_ls_tells_of_every_checkpoint_newest_first(runs: Runs) -> None:
    folder = runs.folder / "saves"
    for step in (5, 10, 15, 20):
        save(folder, step, save_latest=step != 20)
    flip(folder / "step5" / "manifest.json", 30)
    (folder / "step10" / "rank-1.json").unlink()
    checkpoint(runs, "pin", "saves", "step10")
    found = told(runs, "ls", "saves")
    assert [one["tag"] for one in found] == ["step15", "step20", "step10", "step5"]
    newest = found[0]
    assert {key: newest[key] for key in ("step", "world_size", "stage", "whole", "damage", "pinned", "latest")} == {
        "step": 15, "world_size": 2, "stage": 2, "whole": True, "damage": None, "pinned": False, "latest": True,
    }  # fmt: skip
    assert newest["size_bytes"] == sum(p.stat().st_size for p in (folder / "step15").glob("rank-*"))
    assert [one["latest"] for one in found[1:]] == [False, False, False]
    assert (found[2]["pinned"], found[2]["whole"]) == (True, False)
    assert found[2]["damage"] == "rank-1.json cannot be read: No such file or directory"
    assert not found[3]["whole"]
    assert "step" not in found[3]
    lines = checkpoint(runs, "ls", "saves").stdout.splitlines()
    rows = [line.split() for line in lines if "step" in line][1:]
    assert [row[0] for row in rows] == ["step15", "step20", "step10", "step5"]
    assert rows[0][1] == "15"
    assert rows[0][-4:] == ["2", "2", "latest", "yes"]
    assert "pinned" in rows[2]


def test_a_run_is_taken_for_its_checkpoints(runs: Runs) -> None:
    run = runs.folder / "runs" / "gpt-20260101-000000"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"name": "gpt", "checkpoint": {"dir": None}}))
    save(run / "checkpoints", 5)
    for name in ("gpt", str(run), run.name):
        assert [one["tag"] for one in told(runs, "ls", name)] == ["step5"]
    save(runs.folder / "elsewhere", 6)
    (run / "config.json").write_text(json.dumps({"name": "gpt", "checkpoint": {"dir": str(runs.folder / "elsewhere")}}))
    assert [one["tag"] for one in told(runs, "ls", "gpt")] == ["step6"]
    assert told(runs, "verify", "gpt")["checkpoint"] == str(runs.folder / "elsewhere" / "step6")


def test_verify_reads_every_byte(runs: Runs) -> None:
    path = save(runs.folder / "saves", 5)
    save(runs.folder / "saves", 6)
    assert told(runs, "verify", "saves") == {
        "checkpoint": "saves/step6", "whole": True, "damage": [],
        "bytes": sum(p.stat().st_size for p in (runs.folder / "saves" / "step6").glob("*.safetensors")),
    }  # fmt: skip
    assert checkpoint(runs, "verify", "saves/step5").stdout.startswith("saves/step5: whole, ")
    flip(path / "rank-1.safetensors")
    damaged = checkpoint(runs, "verify", "saves", "step5", code=4)
    assert damaged.stdout == ""
    assert damaged.stderr.startswith(
        "hpcds: checkpoint 'saves/step5': damaged: rank-1.safetensors does not have the bytes that were written"
    )
    assert damaged.stderr.count("\n") == 1
    found = told(runs, "verify", "saves", "step5", code=4)
    assert found["whole"] is False
    assert len(found["damage"]) == 1
    (path / "rank-0.safetensors").unlink()
    assert told(runs, "verify", "saves", "step5", code=4)["damage"] == [
        "rank-0.safetensors cannot be read: No such file or directory"
    ]


def test_export_writes_what_its_options_say(runs: Runs) -> None:
    save(runs.folder / "saves", 5)
    save(runs.folder / "saves", 6)
    found = told(runs, "export", "saves", "step5", "--to", "out", "--dtype", "bf16")
    assert found == {
        "checkpoint": "saves/step5",
        "step": 5,
        "files": ["out/model.safetensors"],
        "tensors": 2,
        "bytes": 28,
    }
    loaded = load_file(runs.folder / "out" / "model.safetensors")
    assert torch.equal(loaded["a"], weights(5)["model.a"].to(torch.bfloat16))
    assert torch.equal(loaded["b"], weights(5)["model.b"])
    said = checkpoint(runs, "export", "saves", "--to", "w.pt", "--format", "pt").stdout
    assert said == "w.pt: 2 tensors of step 6, 40 B in 1 file(s)\n"
    assert torch.equal(torch.load(runs.folder / "w.pt")["a"], weights(6)["model.a"])
    assert len(told(runs, "export", "saves", "--to", "many", "--max-shard-size", "16B")["files"]) == 3
    refused = checkpoint(runs, "export", "saves", "--to", "out", code=2)
    assert refused.stderr == (
        "hpcds: 'out': it holds exported weights; choose another folder, or --force to replace them\n"
    )
    checkpoint(runs, "export", "saves", "--to", "out", "--force")
    assert torch.equal(load_file(runs.folder / "out" / "model.safetensors")["a"], weights(6)["model.a"])


@pytest.mark.parametrize(("text", "files"), [("16", 3), ("0.001kB", 3), ("1GiB", 1), ("5 gb", 1), ("2T", 1)])
def test_sizes_are_read_as_people_write_them(runs: Runs, text: str, files: int) -> None:
    save(runs.folder / "saves", 5)
    assert len(told(runs, "export", "saves", "--to", "out", "--max-shard-size", text)["files"]) == files


def test_prune_keeps_what_it_is_told_to(runs: Runs) -> None:
    folder = runs.folder / "saves"
    for step in (5, 10, 15, 20, 25):
        save(folder, step)
    checkpoint(runs, "pin", "saves", "step5")
    words = ("prune", "saves", "--keep", "1", "--keep-every", "10")
    assert told(runs, *words, "--dry-run") == {"folder": "saves", "dry_run": True, "removed": ["step15"]}
    assert checkpoint(runs, *words, "--dry-run").stdout == "would remove step15\n"
    assert checkpoint(runs, *words).stdout == "removed step15\n"
    assert checkpoint(runs, *words).stdout == "nothing to remove\n"
    assert told(runs, "unpin", "saves", "step5") == {"checkpoint": "saves/step5", "action": "unpinned"}
    assert told(runs, "prune", "saves", "--keep", "2")["removed"] == ["step10", "step5"]
    assert [one["tag"] for one in told(runs, "ls", "saves")] == ["step25", "step20"]


def test_diff_says_what_is_not_the_same(runs: Runs) -> None:
    base = weights(5)
    save(runs.folder / "a", 5)
    save(runs.folder / "b", 5)
    same = told(runs, "diff", "a", "b/step5")
    assert same == {"first": "a/step5", "second": "b/step5", "compared": 3, "same": True, "different": []}
    assert checkpoint(runs, "diff", "a", "b").stdout == "3 tensors compared, 0 differ\n"
    other = {
        "model.a": base["model.a"] + torch.tensor([[0, 0, 0.5], [0, -0.25, 0]]),
        "model.b": torch.tensor([1, 2], dtype=torch.int32),
        "model.c": torch.ones(1),
        "optimizer.a.m": torch.ones(3, 2),
    }
    save(runs.folder / "c", 6, other)
    found = told(runs, "diff", "a", "c", code=1)
    assert found["same"] is False
    assert found["different"] == [
        {"name": "model.a", "problem": "values", "max_abs": 0.5},
        {"name": "model.b", "problem": "type I64 and I32", "max_abs": 0.0},
        {"name": "model.c", "problem": "only in the second", "max_abs": None},
        {"name": "optimizer.a.m", "problem": "shape [2, 3] and [3, 2]", "max_abs": None},
    ]
    lines = checkpoint(runs, "diff", "a", "c", code=1).stdout.splitlines()
    assert lines[0] == "model.a: values, largest difference 0.5"
    assert lines[-1] == "4 tensors compared, 4 differ"


def test_diff_knows_numbers_that_are_none(runs: Runs) -> None:
    nan, inf = float("nan"), float("inf")
    save(runs.folder / "a", 5, {"model.a": torch.tensor([nan, inf, -0.0, 1.0]), "model.n": torch.tensor([2**60])})
    save(runs.folder / "b", 5, {"model.a": torch.tensor([nan, inf, 0.0, 1.0]), "model.n": torch.tensor([2**60 + 1])})
    save(runs.folder / "c", 5, {"model.a": torch.tensor([nan, nan, 0.0, 1.0]), "model.n": torch.tensor([2**60])})
    save(runs.folder / "d", 5, {"model.a": torch.tensor([nan, 1.0, 0.0, 1.0]), "model.n": torch.tensor([2**60])})
    assert [one["name"] for one in told(runs, "diff", "a", "b", code=1)["different"]] == ["model.n"]
    assert [one["max_abs"] for one in told(runs, "diff", "a", "c", code=1)["different"]] == ["nan"]
    assert [one["max_abs"] for one in told(runs, "diff", "a", "d", code=1)["different"]] == ["inf"]


BAD: dict[tuple[str, ...], tuple[int, str]] = {
    ("ls", "none"): (2, "checkpoint folder 'none': neither a folder nor a run of 'runs'; check it"),
    ("verify", "empty"): (4, "checkpoint folder 'empty': no checkpoint in it; give another"),
    ("verify", "saves", "none"): (4, "checkpoint 'saves/none': no such checkpoint; there are 'step5'"),
    ("verify", "saves", "../x"): (4, "checkpoint tag '../x': not a folder name"),
    ("export", "saves"): (2, "Missing option '--to'"),
    ("export", "saves", "--to", "x", "--dtype", "int8"): (2, "'int8' is not one of 'keep', 'fp32', 'bf16', 'fp16'"),
    ("export", "saves", "--to", "x", "--max-shard-size", "big"): (
        2,
        "--max-shard-size 'big': not a size; use for example",
    ),
    ("export", "saves", "--to", "x", "--max-shard-size", "0"): (2, "--max-shard-size '0': not a size"),
    ("export", "saves", "--to", "x", "--format", "pt", "--max-shard-size", "1GB"): (
        2,
        "--max-shard-size: a .pt is one file",
    ),
    ("export", "saves", "--to", "saves"): (2, "'saves': it holds 'latest', which is no exported weights"),
    ("prune", "saves"): (2, "Missing option '--keep'"),
    ("prune", "saves", "--keep", "0"): (2, "Invalid value for '--keep'"),
    ("pin", "saves", "none"): (4, "checkpoint 'saves/none': no such checkpoint"),
    ("diff", "saves", "none"): (2, "checkpoint folder 'none': neither"),
    ("import-deepspeed", "none", "to"): (4, "DeepSpeed checkpoint 'none': no such folder"),
    ("import-deepspeed", "empty", "to"): (
        4,
        "DeepSpeed checkpoint 'empty': it has no file 'latest'; say which with --tag",
    ),
    ("import-deepspeed", "saves", "to"): (4, "DeepSpeed checkpoint 'saves': no files of DeepSpeed's in 'step5'"),
}


def test_bad_input_is_one_line_and_leaves_nothing(runs: Runs) -> None:
    save(runs.folder / "saves", 5)
    (runs.folder / "empty").mkdir()
    before = sorted(str(path) for path in runs.folder.rglob("*"))
    for number, (words, (code, begin)) in enumerate(BAD.items()):
        done = checkpoint(runs, *words, *(["--json"] if number % 2 else []), code=code)
        assert begin in " ".join(done.stderr.split()), (words, done.stderr)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith(("hpcds: ", "Usage: ")), done.stderr
    assert sorted(str(path) for path in runs.folder.rglob("*")) == before


NO_TORCH = """
import sys
from hpc_ds.cli.entry import main
try:
    main()
except SystemExit as end:
    print(end.code or 0, [name for name in ("torch", "mpi4py") if name in sys.modules])
"""


def test_no_verb_loads_torch(runs: Runs) -> None:
    save(runs.folder / "saves", 5)
    save(runs.folder / "saves", 6)
    for words in (
        "ls saves", "verify saves", "export saves --to out --dtype fp16", "export saves --to w.pt --format pt",
        "diff saves/step5 saves/step5", "pin saves step5", "unpin saves step5", "prune saves --keep 1", "import-deepspeed --help",
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", NO_TORCH, "checkpoint", *words.split()],
            cwd=runs.folder, env=runs.env, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "0 []", words


def test_a_terminal_sees_a_bar_and_a_pipe_does_not(runs: Runs) -> None:
    save(runs.folder / "saves", 5, {"model.a": torch.zeros(1 << 22)})
    words = [sys.executable, "-m", "hpc_ds", "checkpoint", "verify", "saves"]
    environment = {**runs.env, "TERM": "xterm", "COLUMNS": "120"}
    assert checkpoint(runs, "verify", "saves").stderr == ""
    assert "verifying step5" in on_terminal(
        lambda end: subprocess.run(words, cwd=runs.folder, env=environment, stderr=end, check=True)
    )


def on_terminal(run: Callable[[int], Any]) -> str:
    """What a program writes to a terminal."""
    ours, its = pty.openpty()
    try:
        run(its)
        return os.read(ours, 1 << 16).decode()
    finally:
        os.close(its)
        os.close(ours)
