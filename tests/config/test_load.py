"""From files, overrides and arguments to one config; every way in which a file can be wrong, and no other error."""

from __future__ import annotations

import base64
import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.config.job import lead_s
from hpc_ds.config.load import load_job_file, load_resolved, read_json, read_training_config, resolved
from hpc_ds.errors import ConfigError
from hpc_ds.run_dir import write_json

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.config.job import JobConfig


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a job's script, which is not the current one."""
    for name in ("jobs/train.py", "jobs/other.py", "here/other.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "jobs"


def load(folder: Path, data: dict[str, Any] | str, *overrides: str, args: tuple[str, ...] = ()) -> JobConfig:
    text = data if isinstance(data, str) else json.dumps({"script": "train.py", **data})
    (folder / "job.json").write_text(text, encoding="utf-8")
    return load_job_file(folder / "job.json", overrides, args)


# Text of a job file -> what is said about it.
NOT_JSON = {
    "": "line 1, column 1: not JSON: expecting value",
    "{": "line 1, column 2: not JSON: expecting property name",
    '{"script":\n  "train.py",}': r"line 2, column \d+: not JSON: ",
    '{\n "name": "a"\n "script": "b"}': "line 3, column 2: not JSON: expecting ',' delimiter; mend it there",
    "{'script': 'a'}": "line 1, column 2: not JSON: ",
    '{"script": "a"} {}': "line 1, column 17: not JSON: extra data",
    '{"script": "a"} // why': "line 1, column 17: a comment, which JSON does not have; take it out, hjson is not read",
    '{ # why\n"script": "a"}': "line 1, column 3: a comment, which JSON does not have",
    '/* why */ {"script": "a"}': "line 1, column 1: a comment, which JSON does not have",
    '{"a": "\t"}': "line 1, column 8: not JSON: invalid control character",
    "[]": "not a JSON object; write { ... }",
    '"x"': "not a JSON object",
    "null": "not a JSON object",
    '{"name": "a", "script": "b", "name": "c"}': "key 'name' is given twice; keep one",
    '{"script": "b", "resources": {"nodes": 1, "nodes": 2}}': "key 'nodes' is given twice; keep one",
    '{"training": ' + "[" * 9000 + "]" * 9000 + "}": "nested too deeply",
}


@pytest.mark.parametrize(("text", "complaint"), NOT_JSON.items(), ids=lambda text: text[:40])
def test_a_file_that_is_not_json_is_refused_at_its_place(text: str, complaint: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    assert re.match(f"job file '{folder}/job.json'(, |: ){re.escape(complaint) if '{' in complaint else complaint}",
                    str(caught.value))  # fmt: skip
    assert "\n" not in str(caught.value)
    assert caught.value.file == str(folder / "job.json")


# JSON that is JSON, and of which Python still cannot make what it says: errors of ours all the same.
EXTREME = {
    "sections in sections": '{"script": "train.py", "training": ' + '{"a":' * 600 + "1" + "}" * 600 + "}",
    "an endless whole number": '{"script": "train.py", "resources": {"nodes": ' + "9" * 5000 + "}}",
    "a long whole number": '{"script": "train.py", "checkpoint": {"every_minutes": ' + "9" * 400 + "}}",
    "an infinite share": '{"script": "train.py", "training": {"gradient_clipping": 1e999}}',
    "half a letter": '{"script": "train.py", "args": ["\\ud800"]}',
    "half a letter in the environment": '{"script": "train.py", "env": {"A": "\\ud800"}}',
    "half a letter as a key": '{"script": "train.py", "\\ud800": 1}',
    "half a letter in the training config": '{"script": "train.py", "training": {"optimizer": {"type": "\\ud800"}}}',
    "half a letter among free keys": '{"script": "train.py", "training": {"optimizer": {"type": "A", "params": '
    '{"\\ud800": 1}}}}',
    "a user nobody knows": '{"script": "~nobody-of-this-name/train.py"}',
    "a name longer than a file system takes": '{"script": "' + "a" * 300 + '.py"}',
    "a training config with such a name": '{"script": "train.py", "training": "' + "a" * 300 + '.json"}',
    "arguments as text": '{"script": "train.py", "args": "--lr 1"}',
    "arguments as a number": '{"script": "train.py", "args": 5}',
}


@pytest.mark.parametrize("text", EXTREME.values(), ids=EXTREME)
def test_extreme_json_is_refused_too(text: str, folder: Path) -> None:
    with pytest.raises(ConfigError):
        load(folder, text, args=("--more",))


def test_a_file_that_cannot_be_read_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"job file '.*none.json': no such file; check the path"):
        load_job_file(folder / "none.json")
    with pytest.raises(ConfigError, match=r"job file '.*jobs': cannot be read: .*[Ii]s a directory.*; check it"):
        load_job_file(folder)
    (folder / "latin.json").write_bytes(b'{"script": "\xe9"}')
    with pytest.raises(ConfigError, match=r"job file '.*latin.json': cannot be read: .*utf-8.*; check it"):
        load_job_file(folder / "latin.json")
    (folder / "bom.json").write_bytes(b'\xef\xbb\xbf{"script": "x"}')
    with pytest.raises(ConfigError, match=r"bom.json', line 1, column 1: not JSON: .*bom"):
        load_job_file(folder / "bom.json")


def test_paths_in_a_file_are_relative_to_it(folder: Path) -> None:
    (folder / "ds.json").write_text('{"train_batch_size": 4}')
    job = load(
        folder,
        {"training": "ds.json", "checkpoint": {"dir": "../saves"}, "runtime": {"kind": "venv", "path": "venv"}},
    )
    assert job.script == str(folder / "train.py")
    assert job.workdir == str(folder)
    assert os.path.normpath(str(job.checkpoint.dir)) == str(folder.parent / "saves")
    assert job.runtime.path == str(folder / "venv")
    assert job.training == {"train_batch_size": 4}


def test_absolute_paths_and_those_of_the_home_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    job = load(folder, {"script": str(folder / "train.py"), "workdir": "~", "checkpoint": {"dir": "~/saves"}})
    assert (job.script, job.workdir) == (str(folder / "train.py"), str(tmp_path / "here"))
    assert job.checkpoint.dir == str(tmp_path / "here" / "saves")


def test_a_relative_workdir_is_relative_to_the_file(folder: Path) -> None:
    assert load(folder, {"workdir": "sub"}).workdir == str(folder / "sub")


def test_paths_in_overrides_are_relative_to_the_current_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "here" / "ds.json").write_text('{"train_batch_size": 8}')
    job = load(folder, {}, "script=other.py", "training=ds.json", "checkpoint.dir=saves", "workdir=.")
    assert job.script == str(tmp_path / "here" / "other.py")
    assert job.checkpoint.dir == str(tmp_path / "here" / "saves")
    assert job.workdir == str(tmp_path / "here")
    assert job.training == {"train_batch_size": 8}


def test_a_command_may_stand_in_the_place_of_a_script(folder: Path) -> None:
    job = load(folder, '{"command": ["python", "-m", "x"]}')
    assert (job.script, job.command, job.workdir) == (None, ["python", "-m", "x"], str(folder))


def test_a_script_that_is_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"job.json: script '.*/none.py': no such file; check the path") as caught:
        load(folder, {"script": "none.py"})
    assert caught.value.key == "script"
    with pytest.raises(ConfigError, match=r"script '.*/jobs': no such file"):
        load(folder, {"script": "."})


def test_further_arguments_come_after_those_of_the_file(folder: Path) -> None:
    assert load(folder, {"args": ["-a"]}, args=("--b", "c d")).args == ["-a", "--b", "c d"]
    assert load(folder, {}, args=("--b",)).args == ["--b"]
    assert load(folder, {"args": ["-a"]}, 'args=["-c"]', args=("--b",)).args == ["-c", "--b"]


# --set KEY=VALUE -> where it lands, and as what.
OVERRIDES: dict[str, tuple[str, Any]] = {
    "resources.nodes=4": ("resources.nodes", 4),
    "resources.time=90": ("resources.time", "90"),
    "resources.mem=64": ("resources.mem", "64"),
    "resources.account=007": ("resources.account", "007"),
    "resources.partition=true": ("resources.partition", "true"),
    'resources.exclude=["n1","n2"]': ("resources.exclude", ["n1", "n2"]),
    "resources.sbatch.nice=5": ("resources.sbatch.nice", 5),
    "resources.sbatch.mail-type=END": ("resources.sbatch.mail-type", "END"),
    "resources.sbatch.hold=null": ("resources.sbatch.hold", None),
    "resources.sbatch.requeue=false": ("resources.sbatch.requeue", False),
    'resources={"nodes": 3}': ("resources.nodes", 3),
    "name=123": ("name", "123"),
    "env.A=1": ("env.A", "1"),
    "env.A=": ("env.A", ""),
    "env.A=x=y": ("env.A", "x=y"),
    'env.A="quoted"': ("env.A", '"quoted"'),
    "env.A=[1": ("env.A", "[1"),
    "checkpoint.async=true": ("checkpoint.async_", True),
    "checkpoint.every_minutes=null": ("checkpoint.every_minutes", None),
    "restart.lead=90": ("restart.lead", 90),
    "restart.lead=auto": ("restart.lead", "auto"),
    "restart.max_crashes=0": ("restart.max_crashes", 0),
    "training.train_batch_size=16": ("training.train_batch_size", 16),
    "training.zero_optimization.stage=2": ("training.zero_optimization.stage", 2),
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDES.items(), ids=str)
def test_an_override_sets_one_key(override: str, expected: tuple[str, Any], folder: Path) -> None:
    found: Any = load(folder, {"resources": {"nodes": 2}}, override)
    for part in expected[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == expected[1]
    assert type(found) is type(expected[1])


def test_overrides_are_taken_in_their_order_and_leave_the_rest(folder: Path) -> None:
    job = load(folder, {"resources": {"nodes": 2, "mem": "1G"}}, "resources.nodes=3", "resources.nodes=4")
    assert (job.resources.nodes, job.resources.mem) == (4, "1G")


def test_overrides_below_a_training_file_are_refused_in_words(folder: Path) -> None:
    (folder / "ds.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"--set 'training.seed=1': training is not a section; check the key"):
        load(folder, {"training": "ds.json"}, "training.seed=1")


BAD_OVERRIDES = {
    "nodes": "--set 'nodes': not KEY=VALUE; write for example resources.nodes=4",
    "=4": "--set '=4': not KEY=VALUE",
    "a..b=4": "--set 'a..b=4': not KEY=VALUE",
    ".a=4": "--set '.a=4': not KEY=VALUE",
    "a.=4": "--set 'a.=4': not KEY=VALUE",
    "": "--set '': not KEY=VALUE",
    "script.x=4": "--set 'script.x=4': script is not a section; check the key",
    "resorces.nodes=4": ".*job.json: resorces: unknown key; did you mean 'resources'",
    "resources.node=4": ".*job.json: resources.node: unknown key; did you mean 'nodes'",
    "resources.nodes=four": ".*job.json: resources.nodes 'four': not a whole number",
    "resources.nodes=1e3": ".*job.json: resources.nodes 1000.0: not a whole number",
    "training=" + "[" * 100_000: ".",
    "resources.nodes=" + "9" * 5000: ".",
    "checkpoint.dir=~nobody-of-this-name/x": ".",
}


@pytest.mark.parametrize(("override", "complaint"), BAD_OVERRIDES.items(), ids=lambda text: text[:40])
def test_a_bad_override_is_refused(override: str, complaint: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(folder, {}, override)


def test_the_training_config_is_checked_against_the_world(folder: Path) -> None:
    sizes = {"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}
    assert load(folder, {"training": sizes, "resources": {"nodes": 2}}).training == sizes
    with pytest.raises(ConfigError) as caught:
        load(folder, {"training": sizes, "resources": {"nodes": 2, "gpus_per_node": 4}})
    for number in ("train_batch_size 12", "per_gpu 2", "accumulation_steps 3", "world size 8", "= 48"):
        assert number in str(caught.value)


def test_a_training_file_with_a_fault_names_it(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"training config '.*/none.json': no such file"):
        load(folder, {"training": "none.json"})
    (folder / "ds.json").write_text('{"gradient_cliping": 1}')
    with pytest.raises(ConfigError, match="training: gradient_cliping: unknown key; did you mean 'gradient_clipping'"):
        load(folder, {"training": "ds.json"})
    (folder / "ds.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ConfigError, match=r"training config '.*/ds.json': key 'a' is given twice"):
        load(folder, {"training": "ds.json"})


def test_a_resolved_job_reads_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    job = load(
        folder,
        {
            "args": ["--x", "\u00e9\n"],
            "env": {"A": "'"},
            "training": {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            "resources": {"time": "1:00:00", "sbatch": {"hold": None, "nice": 3}},
            "checkpoint": {"async": True, "every_minutes": 0.5},
        },
    )
    write_json(tmp_path / "config.json", resolved(job))
    again = load_resolved(tmp_path / "config.json")
    assert again == job
    assert lead_s(again) == 180


def test_a_resolved_job_that_was_changed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"script": "/x.py", "nodes": 2}')
    with pytest.raises(ConfigError, match="nodes: unknown key"):
        load_resolved(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"run config '.*/none.json': no such file"):
        load_resolved(tmp_path / "none.json")


def test_json_is_read_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"\u00e9": [1, 1.5, null, true, {"a": "b"}]}', encoding="utf-8")
    assert read_json(tmp_path / "x.json", "file") == {"\u00e9": [1, 1.5, None, True, {"a": "b"}]}


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode()


def test_a_training_config_comes_in_any_of_deepspeeds_forms(tmp_path: Path) -> None:
    data = {"train_batch_size": 8, "comment?>~": "\u00ff\u00fe\u00ff"}
    text = json.dumps(data, ensure_ascii=False)
    assert set(encoded(text)) & set("-_"), "the text must use what only this alphabet has"
    file = tmp_path / "ds.json"
    file.write_text(text, encoding="utf-8")
    assert read_training_config(data) == (data, "training config")
    assert read_training_config(file) == (data, str(file))
    assert read_training_config(str(file)) == (data, str(file))
    assert read_training_config(encoded(text)) == (data, "training config in base64")
    assert read_training_config(encoded(text).rstrip("=")) == (data, "training config in base64")
    assert read_training_config(f" {base64.b64encode(text.encode()).decode()}\n")[0] == data


# What is no training config -> what is said about it.
NO_CONFIG = {
    "none.json": "training config 'none.json': no such file; check the path",
    "config": "training config 'config': no such file",  # base64 of something that is no text
    encoded("[1]"): "training config '",  # base64 of something that is no section
    encoded('{"a": 1, "a": 2}'): "training config in base64: key 'a' is given twice; keep one",
    encoded('{"a": 1 # why\n}'): "training config in base64, line 1, column 9: a comment, which JSON does not have;",
    "": "training config",
    "a" * 300: "training config",
    "a\0b": "training config",
    "\ud800": "training config",
}


@pytest.mark.parametrize(("source", "complaint"), NO_CONFIG.items(), ids=lambda text: repr(text)[:20])
def test_what_is_no_training_config_is_refused_in_one_sentence(source: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_training_config(source)
    assert str(caught.value).startswith(complaint)
    assert "\n" not in str(caught.value)
