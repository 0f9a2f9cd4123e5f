"""The devices that a launch may use, by variables and by what drivers say."""

from __future__ import annotations

import ctypes.util
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.errors import ConfigError, HpcdsError
from hpc_ds.launch import devices
from hpc_ds.launch.devices import other_variables, visible_devices

if TYPE_CHECKING:
    from pathlib import Path

UUID = "GPU-5c1a9e1e-3f3b-4a25-9a3c-0d2b1f0e7a11"
MIG = "MIG-GPU-5c1a9e1e-3f3b-4a25-9a3c-0d2b1f0e7a11/1/0"

VISIBLE = {
    "CUDA_VISIBLE_DEVICES=4,5": (("4", "5"), "CUDA_VISIBLE_DEVICES"),
    f"CUDA_VISIBLE_DEVICES={UUID},{MIG}": ((UUID, MIG), "CUDA_VISIBLE_DEVICES"),
    "CUDA_VISIBLE_DEVICES= 1 , 0": (("1", "0"), "CUDA_VISIBLE_DEVICES"),
    "CUDA_VISIBLE_DEVICES=": ((), "CUDA_VISIBLE_DEVICES"),
    "CUDA_VISIBLE_DEVICES=-1": ((), "CUDA_VISIBLE_DEVICES"),
    "CUDA_VISIBLE_DEVICES=NoDevFiles": ((), "CUDA_VISIBLE_DEVICES"),
    "CUDA_VISIBLE_DEVICES=2,-1,3": (("2",), "CUDA_VISIBLE_DEVICES"),
    "HIP_VISIBLE_DEVICES=3,1": (("3", "1"), "HIP_VISIBLE_DEVICES"),
    "ROCR_VISIBLE_DEVICES=6,7": (("0", "1"), "ROCR_VISIBLE_DEVICES"),
    "ROCR_VISIBLE_DEVICES=": ((), "ROCR_VISIBLE_DEVICES"),
}


def environ(text: str) -> dict[str, str]:
    return dict([text.split("=", 1)])


@pytest.mark.parametrize("text", VISIBLE)
def test_a_variable_says_what_is_visible(text: str) -> None:
    assert visible_devices(environ(text)) == VISIBLE[text]


def test_a_device_twice_is_refused() -> None:
    """CUDA takes such a list for no devices at all."""
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES '0,1,0': device '0' twice; name it once"):
        visible_devices({"CUDA_VISIBLE_DEVICES": "0,1,0"})


def test_what_is_picked_is_picked_out_of_the_visible_set() -> None:
    assert visible_devices(environ(f"CUDA_VISIBLE_DEVICES=4,{UUID},6")).pick([1, 2]) == (UUID, "6")


def test_the_variable_of_hip_is_rewritten_too() -> None:
    """It wins over CUDA's on machines with AMD devices."""
    assert other_variables({"HIP_VISIBLE_DEVICES": "5,6,7"}, [0, 2]) == {"HIP_VISIBLE_DEVICES": "5,7"}
    assert other_variables({"CUDA_VISIBLE_DEVICES": "5,6,7"}, [0, 2]) == {}
    assert other_variables({"HIP_VISIBLE_DEVICES": "5"}, [0, 2]) == {}


def test_without_a_variable_the_drivers_are_asked() -> None:
    seen = visible_devices({})
    if shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        assert len(seen.ids) == listed.count("GPU ")
    assert seen.source in {"", "NVML", "KFD"}
    assert seen.ids == tuple(map(str, range(len(seen.ids))))
    assert bool(seen.ids) == bool(seen.source)


def test_libraries_that_are_not_nvml_say_nothing() -> None:
    assert devices._count_nvml("libof-nobody.so.1") == 0
    assert devices._count_nvml(ctypes.util.find_library("m") or "libm.so.6") == 0


NVML = """
int nvmlInit_v2(void) { return WORKS ? 0 : 9; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 3; return 0; }
int nvmlShutdown(void) { return 0; }
"""


@pytest.mark.skipif(
    shutil.which("cc") is None, reason="cc: not installed; it builds a library with the functions of NVML"
)
def test_devices_are_those_that_nvml_counts(tmp_path: Path) -> None:
    (tmp_path / "nvml.c").write_text(NVML)
    for works in (0, 1):
        library = str(tmp_path / f"nvml{works}.so")
        subprocess.run(
            ["cc", "-shared", "-fPIC", f"-DWORKS={works}", "-o", library, str(tmp_path / "nvml.c")], check=True
        )
        assert devices._count_nvml(library) == 3 * works


def test_amd_devices_are_those_with_simd_units(tmp_path: Path) -> None:
    for node, text in {
        "0": "cpu_cores_count 64\nsimd_count 0\n",
        "1": "cpu_cores_count 0\nsimd_count 440\nvendor_id 4098\n",
        "2": "simd_count 440\n",
        "3": "",
        "4": "simd_count",
    }.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "properties").write_text(text)
    (tmp_path / "5").mkdir()
    (tmp_path / "6" / "properties").mkdir(parents=True)
    assert devices._count_kfd(tmp_path) == 2
    assert devices._count_kfd(tmp_path / "absent") == 0


@given(st.text(alphabet="01,- GPUMIG/\0", max_size=12))
def test_any_value_is_taken_or_refused(value: str) -> None:
    try:
        seen = visible_devices({"CUDA_VISIBLE_DEVICES": value})
    except HpcdsError:
        return
    assert len(set(seen.ids)) == len(seen.ids)
    assert "" not in seen.ids
