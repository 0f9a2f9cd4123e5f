"""The run folder: made once, found by any of its names, and written so that a crash leaves the old file or the new."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_ds.errors import RunError
from hpc_ds.run_dir import RunDir, append_line, read_lines, read_object, write_atomic, write_json

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _own_list_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def made(runs: Path, name: str = "gpt", job_id: str | None = None) -> RunDir:
    run = RunDir.create(runs, name)
    write_json(run.config, {"name": name})
    if job_id is not None:
        write_json(run.job, {"job_id": job_id})
    return run


def test_a_new_run_has_its_folders(tmp_path: Path) -> None:
    run = RunDir.create(tmp_path / "a" / "runs", "gpt")
    assert run.root.parent == tmp_path / "a" / "runs"
    assert run.root.name.startswith("gpt-")
    assert sorted(path.name for path in run.root.iterdir()) == ["checkpoints", "logs", "rendezvous"]
    assert run.attempt_logs(3) == run.root / "logs" / "attempt-3"


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda _form: "20260131-120000")
    roots = [RunDir.create(tmp_path, "gpt").root.name for _ in range(3)]
    assert roots == ["gpt-20260131-120000", "gpt-20260131-120000-2", "gpt-20260131-120000-3"]


def test_a_relative_folder_of_runs_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunDir.create(tmp_path.relative_to(tmp_path) / "runs", "gpt").root.parent == tmp_path / "runs"


def test_runs_cannot_be_made_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(RunError, match=r"runs folder '.*/runs': no run can be made in it: .*; choose another"):
        RunDir.create(tmp_path / "runs", "gpt")


def test_a_run_is_found_by_every_name_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path / "runs", job_id="4711")
    monkeypatch.chdir(tmp_path)
    words = ["gpt", "4711", run.root.name, f"runs/{run.root.name}", str(run.root), f"{run.root}/"]
    assert [RunDir.find(word, tmp_path / "runs").root.resolve() for word in words] == [run.root] * len(words)


def test_the_folder_of_a_found_run_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is printed, written down and handed to processes elsewhere."""
    run = made(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    relative = (tmp_path / "runs").relative_to(tmp_path)
    assert RunDir.find("gpt", relative).root == run.root


def test_the_newest_of_several_runs_is_meant(tmp_path: Path) -> None:
    runs = [made(tmp_path) for _ in range(3)]
    for age, run in zip((20, 5, 60), runs, strict=True):
        os.utime(run.config, (1_700_000_000 - age, 1_700_000_000 - age))
    assert RunDir.find("gpt", tmp_path).root == runs[1].root


def test_a_remembered_run_is_found_from_anywhere(tmp_path: Path) -> None:
    run = made(tmp_path / "elsewhere", job_id="12")
    with pytest.raises(RunError):
        RunDir.find("12", tmp_path / "runs")
    run.remember()
    assert RunDir.find("12", tmp_path / "runs").root == run.root


def test_a_remembered_run_that_was_removed_is_no_run(tmp_path: Path) -> None:
    run = made(tmp_path / "elsewhere")
    run.remember()
    run.config.unlink()
    with pytest.raises(RunError):
        RunDir.find("gpt", tmp_path / "runs")


def test_a_home_that_cannot_be_written_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    made(tmp_path).remember()


NOT_RUNS = {
    "gpt": "run 'gpt': neither a run folder nor the job id or name of a run in '.*'; check it",
    "": "run '': neither a run folder",
    "./nowhere": "run 'nowhere': no such folder; give the folder that `hpcds submit` printed",
    "/": "run '/': not a run folder",
    "a" * 300: "run 'aaa.*': neither a run folder",
    "x/" + "a" * 300: "run 'x/aaa.*",
}


@pytest.mark.parametrize(("text", "message"), NOT_RUNS.items(), ids=lambda text: text[:20])
def test_what_is_no_run_is_said_to_be_none(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=message) as caught:
        RunDir.find(text, tmp_path)
    assert caught.value.exit_code == 2


def test_an_empty_name_means_no_run(tmp_path: Path) -> None:
    write_json(RunDir.create(tmp_path, "gpt").config, {})
    with pytest.raises(RunError):
        RunDir.find("", tmp_path)


def test_atomic_writing_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old and long\n")
    write_atomic(path, "n\u00e9w")
    assert path.read_bytes() == "n\u00e9w".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_rename_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(path, "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_file_is_secret_from_the_start(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        write_atomic(tmp_path / "env.sh", "export KEY=1\n", mode=0o600)
        write_atomic(tmp_path / "open", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "env.sh").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o644


def test_a_torn_last_line_is_left_out_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, {"step": 1})
    append_line(path, {"step": 2})
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_line_after_a_torn_one_is_read(tmp_path: Path) -> None:
    """The next attempt writes where a killed one stopped in the middle of a line."""
    path = tmp_path / "attempts.jsonl"
    append_line(path, {"number": 1})
    with path.open("ab") as file:
        file.write(b'{"number": 1, "cau')
    append_line(path, {"number": 2})
    assert read_lines(path)[-1] == {"number": 2}


def test_lines_that_are_no_objects_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'[1]\n\nnull\n{"a": 1}\n\xff\xfe\n"x"\n{"b": 2}')
    assert read_lines(path) == [{"a": 1}, {"b": 2}]
    assert read_lines(tmp_path / "missing") == []


def test_line_separators_of_unicode_do_not_tear_a_line(tmp_path: Path) -> None:
    data = {"text": "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\n"}
    append_line(tmp_path / "events.jsonl", data)
    assert read_lines(tmp_path / "events.jsonl") == [data]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers() | st.none(), max_size=3)))
def test_lines_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, data: list[dict]) -> None:
    path = tmp_path_factory.mktemp("lines") / "events.jsonl"
    for line in data:
        append_line(path, line, durable=False)
    assert read_lines(path) == data


WRITER = """
import sys
from pathlib import Path
from hpc_ds.run_dir import append_line
for count in range(200):
    append_line(Path(sys.argv[1]), {"count": count, "text": "x" * 300}, durable=False)
"""


def test_several_writers_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert len(read_lines(path)) == 600


OBJECTS = {'{"a": 1}': {"a": 1}, "[1]": {}, "": {}, '{"a"': {}, "null": {}}


@pytest.mark.parametrize(("text", "data"), OBJECTS.items())
def test_an_object_is_read_or_an_empty_one(text: str, data: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "file").write_text(text)
    assert read_object(tmp_path / "file") == data
    assert read_object(tmp_path / "missing") == {}


def test_json_is_written_for_people(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"name": "\u00e9"})
    text = (tmp_path / "file").read_text(encoding="utf-8")
    assert text == '{\n  "name": "\u00e9"\n}\n'
    assert json.loads(text) == {"name": "\u00e9"}
