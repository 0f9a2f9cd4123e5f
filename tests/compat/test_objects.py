"""Small things of DeepSpeed's that scripts use: each does what its name says."""

from __future__ import annotations

import io
import json
import logging
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from hpc_ds.compat import (
    checkpoint,
    clock,
    config,
    flops,
    groups,
    helpers,
    launcher,
    loaders,
    logs,
    monitor,
    optimizers,
)
from hpc_ds.compat.accelerator import CpuAccelerator, CudaAccelerator, get_accelerator, set_accelerator
from hpc_ds.errors import ConfigError, HostfileError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_loader_without_an_end_begins_again() -> None:
    endless = loaders.RepeatingLoader([1, 2])
    assert [next(endless) for _ in range(5)] == [1, 2, 1, 2, 1]
    assert iter(endless) is endless


def test_deepspeeds_loader_hands_out_every_sample() -> None:
    loader = loaders.DeepSpeedDataLoader(torch.arange(7), 2, pin_memory=True, local_rank=-1, tput_timer=None)
    assert len(loader) == 4
    for _ in range(2):
        assert sorted(value.item() for batch in loader for value in batch) == list(range(7))
    short = loaders.DeepSpeedDataLoader(torch.arange(7), 2, dataloader_drop_last=True)
    assert [len(batch) for batch in short] == [2, 2, 2]


def test_timers_add_up_what_runs_between_start_and_stop() -> None:
    timers = clock.SynchronizedWallClockTimer()
    timer = timers("forward")
    assert timers("forward") is timer
    timer.start()
    with pytest.raises(ConfigError, match="timer 'forward': it is running already; stop it first"):
        timer.start()
    timer.stop()
    with pytest.raises(ConfigError, match="timer 'forward': it is not running; start it first"):
        timer.stop()
    first = timer.elapsed(reset=False)
    assert first == timer.mean() == timer.elapsed()
    assert timer.elapsed() == 0
    timer.start()
    assert timer.elapsed() > 0
    assert timer.started_
    assert clock.trim_mean([], 0.1) == 0
    assert clock.trim_mean([100, *range(1, 10)], 0.1) == 5.5
    noop = clock.NoopTimer()
    noop("x").start()
    assert (noop("x").elapsed(), noop.get_timers()) == (0, {})


def test_a_log_of_timers_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    timers = clock.SynchronizedWallClockTimer()
    timers("step").start()
    timers("step").stop()
    timers.log(["step", "nothing"])
    assert capsys.readouterr().out.startswith("[Rank -1] time (ms) | step: ")
    assert timers.memory_usage().startswith(" | mem_allocated: ")


@pytest.fixture
def said() -> Any:
    """What DeepSpeed's logger says."""
    stream, level = io.StringIO(), logs.logger.level
    handler = logging.StreamHandler(stream)
    logs.logger.addHandler(handler)
    yield stream
    logs.logger.removeHandler(handler)
    logs.logger.setLevel(level)


def test_the_logger_is_deepspeeds_own(said: Any) -> None:
    assert (logs.logger.name, logs.get_current_level(), logs.logger.propagate) == ("DeepSpeed", logging.WARNING, False)
    logs.log_dist("not shown", ranks=[0])
    logs.set_log_level_from_string("info")
    logs.log_dist("shown", ranks=[0])
    logs.logger.warning_once("once")
    logs.logger.warning_once("once")
    logs.print_configuration(Namespace(b=1, a="x"), "arguments")
    assert said.getvalue().splitlines()[:4] == ["[Rank -1] shown", "once", "arguments:", f"  a{'.' * 28} x"]
    assert logs.should_log_le("warning")
    assert not logs.should_log_le("debug")
    with pytest.raises(ConfigError, match="log level 'loud': not a level; use debug, info"):
        logs.set_log_level_from_string("loud")


def test_copies_for_torch_save_hold_their_own_elements_alone(tmp_path: Path) -> None:
    buffer = torch.arange(10_000.0)
    state = {"a": buffer[:2], "b": [buffer[2:3], (buffer[3], "text")], "c": 5}
    copy = checkpoint.clone_tensors_for_torch_save(state)
    torch.save(copy, tmp_path / "copy.pt")
    assert (tmp_path / "copy.pt").stat().st_size < 10_000
    assert torch.equal(copy["a"], buffer[:2])
    assert copy["b"][1][1] == "text"
    assert copy["a"].untyped_storage().nbytes() == 8


def test_what_is_made_on_a_device_is_there_in_its_type() -> None:
    with helpers.OnDevice(dtype=torch.bfloat16, device="meta"):
        layer = nn.Linear(3, 4)
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    with helpers.OnDevice(dtype=torch.float16, enabled=False):
        layer = nn.Linear(3, 4)
    assert (layer.weight.device.type, layer.weight.dtype) == ("cpu", torch.float32)
    assert torch.get_default_dtype() == torch.float32


def test_tensors_in_containers_move() -> None:
    moved = helpers.move_to_device({"a": torch.ones(2), "b": [torch.ones(1), (1, "x")]}, "meta")
    assert (moved["a"].device.type, moved["b"][0].device.type, moved["b"][1]) == ("meta", "meta", (1, "x"))


def test_gradients_of_a_plain_module_are_clipped() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert helpers.clip_grad_norm_(layer.parameters(), 1.0) == 5
    assert layer.weight.grad.norm().item() == pytest.approx(1, rel=1e-4)
    with pytest.raises(ConfigError, match="an mpu is for model parallelism"):
        helpers.clip_grad_norm_(layer.parameters(), 1.0, mpu=object())


def test_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    helpers.see_memory_usage("quiet")
    helpers.see_memory_usage("before the step", force=True)
    assert capsys.readouterr().out.startswith("before the step\nMA ")


def test_the_accelerator_of_a_machine_without_gpus_is_its_cpu() -> None:
    device: Any = CpuAccelerator()
    assert [device.device_name(), device.current_device_name(), device.device_name(3)] == ["cpu", "cpu", "cpu"]
    assert (device.communication_backend_name(), device.is_available(), device.is_synchronized_device()) == (
        "gloo",
        True,
        True,
    )
    assert device.device_count() >= 1
    assert device.IntTensor([1]).dtype == torch.int
    assert device.max_memory_allocated() >= device.memory_allocated() // 2 > 0
    assert device.available_memory() < device.total_memory()
    assert torch.bfloat16 in device.supported_dtypes()
    assert device.on_accelerator(torch.ones(1))
    assert [device.Event, device.synchronize(), device.empty_cache(), device.set_device(0)] == [None] * 4
    state = device.get_rng_state()
    device.manual_seed(3)
    device.set_rng_state(state)
    assert torch.equal(torch.get_rng_state(), state)
    with device.stream(None):
        pass
    with pytest.raises(AttributeError, match=r"accelerator.fly: hpc_ds has no such name; use torch.cuda"):
        device.fly()
    set_accelerator(get_accelerator())
    with pytest.raises(ConfigError, match="set_accelerator: CudaAccelerator is another device than hpc_ds trains on, "):
        set_accelerator(CudaAccelerator())


def test_the_accelerator_of_a_gpu_is_torchs_cuda() -> None:
    device: Any = CudaAccelerator()
    assert [device.device_name(), device.device_name(1), str(device.device(1))] == ["cuda", "cuda:1", "cuda:1"]
    assert device.memory_allocated is torch.cuda.memory_allocated
    assert device.max_memory_cached is torch.cuda.max_memory_reserved
    assert device.Stream is torch.cuda.Stream
    assert device.communication_backend_name() == "nccl"


def test_groups_other_than_of_all_ranks_are_refused() -> None:
    groups.initialize()
    with pytest.raises(
        ConfigError, match=r"groups.initialize: ep_size 4, mpu None: every rank is data-parallel; leave them out"
    ):
        groups.initialize(ep_size=4)


def test_a_monitor_of_the_config_writes_a_scripts_own_events(tmp_path: Path) -> None:
    read = config.DeepSpeedConfig(
        {"train_batch_size": 4, "csv_monitor": {"enabled": True, "output_path": str(tmp_path), "job_name": "mine"}}
    )
    master = monitor.MonitorMaster(read.monitor_config)
    assert master.enabled
    master.write_events([("Eval/accuracy", 0.5, 10)])
    (file,) = tmp_path.rglob("*.csv")
    assert file.read_text() == "step,accuracy\n10,0.5\n"
    assert not monitor.MonitorMaster(config.DeepSpeedConfig({"train_batch_size": 4}).monitor_config).enabled


def test_a_config_says_what_it_lacks_and_needs_no_model_parallelism(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: Any
) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps({"train_batch_size": 8, "steps_per_print": 5}))
    read = config.DeepSpeedConfig(str(path))
    assert (read.steps_per_print, read.fp16.enabled) == (5, False)
    with pytest.raises(AttributeError, match=r"DeepSpeedConfig.pipeline: hpc_ds has no such name"):
        read.pipeline  # noqa: B018
    with pytest.raises(ConfigError, match="mpu and mesh_device are for model parallelism"):
        config.DeepSpeedConfig(str(path), mpu=object())
    logs.logger.setLevel(logging.INFO)
    read.print("config")
    assert '"steps_per_print": 5' in said.getvalue()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    read = config.DeepSpeedConfig(str(path))
    assert (read.world_size, read.global_rank, read.train_micro_batch_size_per_gpu) == (2, 1, 4)


def test_a_model_is_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = nn.Linear(4, 8, bias=False)
    assert flops.get_model_profile(layer, (2, 4), as_string=False, print_profile=False) == (128, 64, 32)
    assert flops.get_model_profile(layer, kwargs={"input": torch.ones(2, 4)}) == ("128 ", "64 MACs", "32")
    assert "forward MACs                64" in capsys.readouterr().out
    profiler = flops.FlopsProfiler(layer)
    with pytest.raises(ConfigError, match=r"FlopsProfiler: nothing is counted; call start_profile\(\)"):
        profiler.get_total_flops()
    profiler.start_profile()
    layer(torch.ones(2, 4))
    profiler.print_model_profile(output_file=str(tmp_path / "profile"))
    assert "forward FLOPs               128" in (tmp_path / "profile").read_text()
    assert profiler.get_total_duration() > 0
    profiler.end_profile()
    with pytest.raises(ConfigError, match="mode 'backward': not a way to run a module"):
        flops.get_model_profile(layer, (2, 4), mode="backward")
    with pytest.raises(ConfigError, match="nothing to call the module with"):
        flops.get_model_profile(layer)


def test_optimizers_train_without_an_engine_and_refuse_what_deepspeeds_refuse() -> None:
    for kind in (optimizers.FusedAdam, optimizers.DeepSpeedCPUAdagrad, optimizers.FusedLion, optimizers.FusedLamb):
        layer = nn.Linear(3, 2)
        made = kind(layer.parameters(), lr=0.1)
        before = layer.weight.detach().clone()
        layer(torch.ones(1, 3)).sum().backward()
        made.step()
        assert not torch.equal(layer.weight, before)
        assert isinstance(made, kind)
    parameters = list(nn.Linear(3, 2).parameters())
    with pytest.raises(ConfigError, match="FusedAdam: amsgrad is not supported; leave it out"):
        optimizers.FusedAdam(parameters, amsgrad=True)
    with pytest.raises(
        ConfigError, match="FusedLamb: max_grad_norm is not supported; use gradient_clipping in the config"
    ):
        optimizers.FusedLamb(parameters, max_grad_norm=1.0)

    class Mine(optimizers.FusedAdam):
        pass

    with pytest.raises(ConfigError, match="Mine: bias_correction=False is not supported; use the class itself"):
        Mine(parameters, bias_correction=False)


def test_slots_that_a_host_has_not_are_refused_in_gaps_too() -> None:
    there = {"a": [0, 2], "b": [1]}
    assert launcher.parse_resource_filter(there, "a:2@b") == {"a": [2], "b": [1]}
    assert launcher.parse_resource_filter(there, exclude_str="a:2") == {"a": [0], "b": [1]}
    for filters in ({"include_str": "a:1"}, {"exclude_str": "a:1"}):
        with pytest.raises(HostfileError, match="filter 'a:1': host 'a' has no slot 1; name one it has"):
            launcher.parse_resource_filter(there, **filters)
