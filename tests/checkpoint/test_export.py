"""Exported weights: the bits that torch would have written, in files that others load, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn

import hpc_ds
from hpc_ds.checkpoint import writer
from hpc_ds.checkpoint.export import TYPES, export_safetensors, export_torch
from hpc_ds.checkpoint.layout import data_file
from hpc_ds.checkpoint.shards import Shard, own_share
from hpc_ds.checkpoint.verify import open_whole
from hpc_ds.errors import CheckpointError, ConfigError, DamagedError

if TYPE_CHECKING:
    from hpc_ds.checkpoint.stored import Stored

TORCH_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BIG = 10**12


class Tied(nn.Module):
    """Two names of one weight, a buffer, types and shapes of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 600)
        self.body = nn.Linear(600, 600)
        self.half = nn.Linear(7, 3).to(torch.bfloat16)
        self.head = nn.Linear(600, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("seen", torch.tensor([3, 4]))
        self.register_buffer("mask", torch.tensor([[True, False]]))
        with torch.no_grad():
            odd = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 65520.0, 1e30, 1.00390625, 1.01171875]
            self.body.bias[: len(odd)] = torch.tensor(odd)


def saved_by(world_size: int, folder: Path, module: nn.Module, tied: dict[str, str] | None = None) -> Stored:
    """A checkpoint of a module and of an optimizer state that no export may contain, written as so many ranks do."""
    names = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = {f"model.{name}": value.detach() for name, value in names.items()}
    tensors["optimizer.scale.exp_avg"] = torch.tensor(2.0)

    def of_rank(rank: int) -> writer.Content:
        shards = [own_share(name, tensor, rank, world_size) for name, tensor in tensors.items()]
        return writer.Content(shards, None, {"t": torch.ones(2)}, {"tied": tied or {}}, 7)

    path = writer.save_in_turn(folder, "tag", (of_rank(rank) for rank in range(world_size)), world_size)
    return open_whole(path)


@pytest.fixture(scope="module")
def module() -> Tied:
    torch.manual_seed(0)
    return Tied()


@pytest.fixture(scope="module")
def stored(module: Tied, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return saved_by(3, tmp_path_factory.mktemp("saved"), module, {"head.weight": "embed.weight"})


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal type, shape and bits, but that any not-a-number is like any other."""
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return False
    if not wanted.is_floating_point():
        return torch.equal(found, wanted)
    integers = {2: torch.int16, 4: torch.int32}[wanted.element_size()]
    equal = found.contiguous().view(integers) == wanted.contiguous().view(integers)
    return bool((equal | (found.isnan() & wanted.isnan())).all())


@pytest.mark.parametrize("dtype", ["keep", "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("max_bytes", [BIG, 1_500_000])
def test_safetensors_have_the_bits_of_torchs_conversion(
    module: Tied, stored: Stored, tmp_path: Path, dtype: str, max_bytes: int
) -> None:
    files = export_safetensors(stored, tmp_path / "out", TYPES[dtype], max_bytes)
    found = {name: value for file in files if file.suffix == ".safetensors" for name, value in load_file(file).items()}
    wanted = {
        name: value.to(TORCH_TYPES.get(dtype, value.dtype)) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_several_files_have_an_index_as_hugging_face_writes_it(module: Tied, stored: Stored, tmp_path: Path) -> None:
    files = export_safetensors(stored, tmp_path / "out", None, 1_500_000)
    names = [file.name for file in files]
    assert names == [*(f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)), "model.safetensors.index.json"]
    index = json.loads(files[-1].read_text())
    loaded = {file.name: load_file(file) for file in files[:-1]}
    assert index["weight_map"] == {name: file for file, tensors in sorted(loaded.items()) for name in tensors}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in module.state_dict().values())
    assert all(sum(value.nbytes for value in of.values()) <= 1_500_000 or len(of) == 1 for of in loaded.values())


def test_one_file_needs_no_index(stored: Stored, tmp_path: Path) -> None:
    assert export_safetensors(stored, tmp_path / "a" / "b", None, BIG) == [tmp_path / "a" / "b" / "model.safetensors"]


@pytest.mark.parametrize("dtype", ["keep", "fp32", "bf16", "fp16"])
def test_a_pt_is_loaded_by_torch_without_trust(module: Tied, stored: Stored, tmp_path: Path, dtype: str) -> None:
    path = export_torch(stored, tmp_path / "weights.pt", TYPES[dtype])[0]
    wanted = {
        name: value.to(TORCH_TYPES.get(dtype, value.dtype)) if value.is_floating_point() else value
        for name, value in module.state_dict().items()
    }
    for mapped in (False, True):
        found = torch.load(path, weights_only=True, mmap=mapped)
        assert sorted(found) == sorted(wanted)
        assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []
        assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
        assert all(value.data_ptr() % 64 == 0 for value in found.values()) or not mapped


def test_both_load_strictly_into_the_plain_model(stored: Stored, module: Tied, tmp_path: Path) -> None:
    file = export_safetensors(stored, tmp_path / "out", None, BIG)[0]
    for weights in (load_file(file), torch.load(export_torch(stored, tmp_path / "w.pt", None)[0])):
        fresh = Tied()
        fresh.load_state_dict(weights)
        assert all(same_bits(value, module.state_dict()[name]) for name, value in fresh.state_dict().items())


class Small(nn.Module):
    """Tied, with a buffer, and trained."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor([seen]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(x)).square().mean()


def engine_saves(rank: int, folder: str) -> None:
    """One step of a tied model at each stage, saved."""
    for stage in (0, 2, 3):
        torch.manual_seed(3)
        model = Small(seen=3)
        optimizer = {"type": "AdamW", "params": {"lr": 0.1}}
        config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer, "zero_optimization": {"stage": stage}}
        engine = hpc_ds.initialize(model=model, config=config)[0]
        engine.backward(engine(torch.arange(11)))
        engine.step()
        engine.save_checkpoint(f"{folder}/{stage}")


@pytest.mark.ranks
def test_what_an_engine_saved_at_any_stage_loads_strictly(tmp_path: Path) -> None:
    run_ranks(engine_saves, 2, str(tmp_path))
    found = []
    for stage in (0, 2, 3):
        stored = open_whole(tmp_path / str(stage) / "global_step1")
        found.append(load_file(export_safetensors(stored, tmp_path / f"out-{stage}", None, BIG)[0]))
        model = Small(seen=0)
        model.load_state_dict(found[-1], strict=True)
        assert torch.equal(model.embed.weight, found[-1]["head.weight"])
        assert model.seen.item() == 3
        torch.testing.assert_close(found[-1], found[0], rtol=0, atol=1e-6)


def test_transformers_loads_it(tmp_path: Path) -> None:
    """A model of a tiny config, with tied embeddings, in several files: as a folder of save_pretrained."""
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=64, n_positions=32)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    stored = saved_by(2, tmp_path / "saved", model, {"lm_head.weight": "transformer.wte.weight"})
    export_safetensors(stored, tmp_path / "out", None, 8_000)
    config.save_pretrained(tmp_path / "out")
    found, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert found.lm_head.weight is found.transformer.wte.weight
    tokens = torch.arange(20)[None]
    assert torch.equal(found.eval()(tokens).logits, model.eval()(tokens).logits)


def test_nothing_is_overwritten(stored: Stored, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export_safetensors(stored, out, None, 1_500_000)
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(
        ConfigError, match="it holds exported weights; choose another folder, or --force to replace them"
    ):
        export_safetensors(stored, out, None, BIG)
    assert sorted(path.name for path in out.iterdir()) == before
    assert export_safetensors(stored, out, None, BIG, force=True) == [out / "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (out / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"it holds 'config\.json', which is no exported weights"):
        export_safetensors(stored, out, None, BIG, force=True)
    with pytest.raises(ConfigError, match="a file is there"):
        export_safetensors(stored, out / "config.json", None, BIG, force=True)


def test_a_pt_is_not_overwritten(stored: Stored, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("mine")
    for place, force in ((path, False), (tmp_path, True)):
        with pytest.raises(ConfigError, match="already there; choose another name"):
            export_torch(stored, place, None, force=force)
    assert path.read_text() == "mine"
    export_torch(stored, path, None, force=True)
    assert "head.weight" in torch.load(path)


def test_a_failure_leaves_nothing(module: Tied, tmp_path: Path) -> None:
    stored = saved_by(2, tmp_path / "saved", module)
    data = tmp_path / "saved" / "tag" / data_file(1)
    raw = bytearray(data.read_bytes())
    raw[-9] ^= 1
    data.write_bytes(raw)
    for export in (
        lambda: export_safetensors(stored, tmp_path / "out", None, BIG),
        lambda: export_torch(stored, tmp_path / "out", None),
    ):
        with pytest.raises(DamagedError, match=r"rank-1\.safetensors does not have the bytes that were written"):
            export()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"not written: (File exists|Not a directory); choose another place"):
        export_safetensors(stored, tmp_path / "file" / "out", None, BIG)


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    content = writer.Content([Shard("optimizer.a.step", (), 0, torch.ones(1))], None, {}, {}, 1)
    stored = open_whole(writer.save(tmp_path, "tag", content))
    with pytest.raises(CheckpointError, match="it holds no weights"):
        export_safetensors(stored, tmp_path / "out", None, BIG)


LIMIT_MIB = 128

EXPORT = """
import re, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (int(sys.argv[1]) << 20,) * 2)
from hpc_ds.cli.entry import main
sys.argv[1:] = sys.argv[2:]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules
peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())
print("peak", int(peak[1]) >> 10)
"""


def test_a_model_four_times_larger_than_the_memory_is_exported(tmp_path: Path) -> None:
    big = nn.Module()
    big.one = nn.Parameter(torch.arange(40 << 20, dtype=torch.float32))  # 160 MiB, more than the limit by itself
    big.other = nn.ParameterList([nn.Parameter(torch.arange(22 << 20, dtype=torch.float32)) for _ in range(4)])
    size = sum(parameter.nbytes for parameter in big.parameters())
    assert size >= 4 * LIMIT_MIB << 20
    saved_by(2, tmp_path / "saved", big)
    for options in (("--format", "safetensors", "--max-shard-size", "200MB"), ("--format", "pt", "--dtype", "bf16")):
        words = ["checkpoint", "export", str(tmp_path / "saved"), "--to", str(tmp_path / options[1]), *options]
        done = subprocess.run(
            [sys.executable, "-c", EXPORT, str(LIMIT_MIB), *words],
            env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        peak = int(done.stdout.split()[-1])
        assert peak < LIMIT_MIB, done.stdout
    weights = torch.load(tmp_path / "pt", mmap=True)
    assert torch.equal(weights["one"][-1000:], big.one[-1000:].to(torch.bfloat16))
