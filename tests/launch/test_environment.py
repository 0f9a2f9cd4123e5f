"""The variables that ranks get: which go along by themselves, which files count, and byte for byte what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.errors import ConfigError, HpcdsError
from hpc_ds.launch.environment import chosen, exported, masked, parse, with_folder

if TYPE_CHECKING:
    from pathlib import Path

GO = [
    "NCCL_DEBUG",
    "NCCL",
    "RCCL_X",
    "UCX_TLS",
    "MV2_X",
    "MLFLOW_URI",
    "PYTHONPATH",
    "PYTHONHASHSEED",
    "OMP_NUM_THREADS",
    "KMP_X",
    "MKL_X",
    "FI_PROVIDER",
    "GLOO_SOCKET_IFNAME",
    "TORCH_HOME",
    "TORCH_LOGS",
    "HF_TOKEN",
    "TRANSFORMERS_CACHE",
    "WANDB_API_KEY",
    "CUDA_HOME",
    "MIOPEN_X",
    "HSA_X",
    "I_MPI_X",
    "OMPI_MCA_btl",
    "PATH",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
    "HPCDS_RUN_DIR",
    "HPCDS_ATTEMPT",
    "HPCDS_DEADLINE",
]
STAY = [
    "HOME",
    "PWD",
    "HOSTNAME",
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "TORCHELASTIC_RUN_ID",
    "HPCDS_LAUNCHER",
    "HPCDS_TOKEN",
    "PATHX",
    "MY_PATH",
    "OMPX",
    "SSH_AUTH_SOCK",
]

READ = {
    "A=1\nB=2\n": {"A": "1", "B": "2"},
    "\n# a comment\n  # another\n \t\nA=1": {"A": "1"},
    "A=a b  \n": {"A": "a b  "},
    "A='a' \"b\" $C #d\n": {"A": "'a' \"b\" $C #d"},
    "A=b=c=\n_B9=\n": {"A": "b=c=", "_B9": ""},
    "A=mlx5_0,mlx5_1\r\nB=2\r\n": {"A": "mlx5_0,mlx5_1", "B": "2"},
    "A=1\nA=2": {"A": "2"},
    "A=x\x0by\x85z\u2028": {"A": "x\x0by\x85z\u2028"},
    "": {},
}
NOT_READ = {
    "A": "f, line 1: 'A' is not a variable; write NAME=VALUE",
    "A=1\nexport B=2": "f, line 2: 'export B=2' is not a variable",
    "A =1": "f, line 1: 'A =1' is not a variable",
    "\n\n1A=1": "f, line 3: '1A=1' is not a variable",
    "=1": "f, line 1: '=1' is not a variable",
    "\N{LATIN SMALL LETTER E WITH ACUTE}=1": "is not a variable",
    "A=\0": "f, line 1: A holds a zero byte",
    "RANK=3": "f, line 1: RANK is what the launcher tells each rank; remove it",
    "MASTER_PORT=3": "f, line 1: MASTER_PORT is set by the launcher; use --master_port",
}


def test_prefixes_and_names_decide_what_goes_along() -> None:
    environ = dict.fromkeys([*GO, *STAY], "x")
    assert sorted(exported(environ)) == sorted(GO)


def test_the_folder_comes_first() -> None:
    assert with_folder("/a:/b", "/c") == "/c:/a:/b"
    assert with_folder("", "/c") == with_folder(None, "/c") == "/c"


@pytest.mark.parametrize("text", READ)
def test_a_file_is_read_literally(text: str) -> None:
    assert parse(text, "f") == READ[text]


@pytest.mark.parametrize("text", NOT_READ)
def test_a_wrong_line_is_refused_with_its_number(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f")
    assert NOT_READ[text] in str(caught.value)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A home folder and a current folder, and what says so."""
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return {"HOME": str(tmp_path / "home")}


def test_the_later_source_wins(tmp_path: Path, places: dict[str, str]) -> None:
    assert chosen(places) == {}
    (tmp_path / "home" / ".deepspeed_env").write_text("A=home\nB=home\nC=home\nD=home\n")
    (tmp_path / "here" / ".deepspeed_env").write_text("B=here\nC=here\nD=here\n")
    (tmp_path / "first").write_text("C=first\nD=first\nE=first")
    (tmp_path / "second").write_text("E=second")
    files = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert chosen(places, files, ["D=last", "F=a=b\nc, 'd'"]) == {
        "A": "home", "B": "here", "C": "first", "D": "last", "E": "second", "F": "a=b\nc, 'd'",
    }  # fmt: skip


def test_a_variable_names_another_file(tmp_path: Path, places: dict[str, str]) -> None:
    (tmp_path / "here" / ".deepspeed_env").write_text("A=not this one")
    (tmp_path / "home" / "mine").write_text("A=home\nB=home")
    (tmp_path / "here" / "mine").write_text("A=here")
    (tmp_path / "path").write_text("A=path")
    assert chosen({**places, "DS_ENV_FILE": "mine"}) == {"A": "here", "B": "home"}
    assert chosen({**places, "DS_ENV_FILE": str(tmp_path / "path")}) == {"A": "path"}
    assert chosen({"DS_ENV_FILE": "mine"}) == {"A": "here"}, "a process without a home"
    with pytest.raises(ConfigError, match="DS_ENV_FILE 'absent': neither in the home folder nor in this one; correct"):
        chosen({**places, "DS_ENV_FILE": "absent"})
    with pytest.raises(ConfigError, match="DS_ENV_FILE '/absent': no such file"):
        chosen({**places, "DS_ENV_FILE": "/absent"})


def test_bytes_that_are_no_text_arrive(tmp_path: Path, places: dict[str, str]) -> None:
    (tmp_path / "bytes").write_bytes(b"A=\xff\xfe\n")
    assert chosen(places, [str(tmp_path / "bytes")])["A"].encode("utf-8", "surrogateescape") == b"\xff\xfe"


@pytest.mark.parametrize(
    ("files", "pairs", "message"),
    [
        (["absent"], [], "environment file 'absent': No such file or directory; name one that can be read"),
        (["."], [], "environment file '.': Is a directory"),
        (["\0"], [], "environment file"),
        ([], ["A"], "--env 'A': is not a variable; write NAME=VALUE"),
        ([], ["LOCAL_RANK=1"], "--env 'LOCAL_RANK=1': LOCAL_RANK is what the launcher tells each rank"),
        ([], ["MASTER_ADDR=a"], "--env 'MASTER_ADDR=a': MASTER_ADDR is set by the launcher; use --master_addr"),
    ],
)
def test_what_cannot_be_used_is_refused(
    files: list[str], pairs: list[str], message: str, places: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(places, files, pairs)
    assert message in str(caught.value)


def test_secrets_are_not_shown() -> None:
    hidden = ["WANDB_API_KEY", "HF_TOKEN", "my_secret", "DB_PASSWORD", "AWS_CREDENTIALS"]
    assert masked(dict.fromkeys([*hidden, "NCCL_DEBUG"], "x")) == {**dict.fromkeys(hidden, "***"), "NCCL_DEBUG": "x"}


@given(st.text(max_size=30))
def test_any_text_is_taken_or_refused(text: str) -> None:
    try:
        found = parse(text, "f")
    except HpcdsError:
        return
    for name, value in found.items():
        assert f"{name}={value}" in text


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z_][A-Z0-9_]{3,9}_", fullmatch=True),
        st.text(st.characters(exclude_characters="\n\r\0", exclude_categories=["Cs"])),
    )
)
def test_what_is_written_is_read(variables: dict[str, str]) -> None:
    assert parse("".join(f"{name}={value}\n" for name, value in variables.items()), "f") == variables
