"""Hooks at the end of an attempt: real processes and a real web server; whatever they do, the run does not mind."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from fakes import FakeScheduler, fake_program

from hpc_ds.cluster import hook
from hpc_ds.cluster.scheduler import JobState
from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.errors import ConfigError
from hpc_ds.supervise import notify, supervisor, talk
from hpc_ds.supervise.ledger import read_ledger
from hpc_ds.supervise.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.run_dir import RunDir

# Python 3.12 warns of a fork where torch has threads. The child only sets signals before it becomes another program.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def attempt(run: RunDir, told: dict[str, Any], program: str = "") -> int:
    data = {"name": "a", "command": [sys.executable, "-c", program], "workdir": str(run.root.parent), "notify": told}
    job: JobConfig = check(JobConfig, data, "job.json")
    return Supervisor(run, job, load_site("local"), "25", FakeScheduler([JobState("RUNNING", nodes="vm")])).attempt()


def test_a_command_reads_how_the_attempt_ended(run: RunDir) -> None:
    program = fake_program(run.root.parent, "tell.sh", 'echo "$@" > words; cat > event.json')
    assert attempt(run, {"command": [str(program), "a b", "$X"]}) == 0
    assert (run.root.parent / "words").read_text() == "a b $X\n"
    event = json.loads((run.root.parent / "event.json").read_text())
    assert (event["event"], event["run_dir"], event["name"]) == ("attempt_ended", str(run.root), "a")
    assert (event["number"], event["cause"], event["action"], event["exit_code"]) == (1, "finished", "finish", 0)


def test_modules_of_the_job_shadow_none_of_ours_and_a_long_failure_is_left_out(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_HELD_STILL_FOR_S", 0.0)
    monkeypatch.setattr(supervisor, "_ANSWER_AT_END_S", 0.0)
    monkeypatch.setattr(talk, "_LOOKS", 1)
    monkeypatch.setattr(notify, "_PATIENCE_BEFORE_THE_NEXT_S", 60.0)
    program = fake_program(run.root.parent, "tell.sh", "pwd > where; cat > event.json")
    (run.root.parent / "json.py").write_text("raise SystemExit('shadowed')\n")
    code = "import sys; print('x' * 100_000); sys.exit(3)"
    assert attempt(run, {"command": [str(program)]}, code) == 3
    assert (run.root.parent / "where").read_text() == f"{run.root.parent}\n"
    event = json.loads((run.root.parent / "event.json").read_text())
    assert (event["cause"], event["action"], event["exit_code"]) == ("crashed", "hold", 3)
    assert len(json.dumps(event)) < 50_000


class Server(http.server.BaseHTTPRequestHandler):
    """Takes one event and answers as it is told to."""

    got: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - the one list of the test
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.got.append((self.headers["Content-Type"], json.loads(body)))
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Server.got.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/hook?x=1"
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [200, 500])
def test_a_web_address_is_told_the_same(status: int, run: RunDir, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "status", status)
    assert attempt(run, {"url": server}) == 0
    ((kind, event),) = Server.got
    assert (kind, event["cause"]) == ("application/json", "finished")


BROKEN = {
    "missing": {"command": ["/none"]},
    "failing": {"command": ["false"]},
    "nobody listens": {"url": "http://127.0.0.1:1/x"},
    "no such host": {"url": "https://nowhere.invalid/"},
    "both": {"command": ["/none"], "url": "http://127.0.0.1:1/x"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_hook_that_cannot_be_had_is_mentioned_and_no_more(
    name: str, run: RunDir, capfd: pytest.CaptureFixture[str]
) -> None:
    assert attempt(run, BROKEN[name]) == 0
    assert "hpcds: notify." in capfd.readouterr().err
    assert [one.cause for one in read_ledger(run)] == ["finished"]


def test_a_hook_that_hangs_is_cut_off(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would sleep longer than this test may last."""
    monkeypatch.setattr(notify, "_PATIENCE_S", 0.2)
    assert attempt(run, {"command": ["sleep", "100000"]}) == 0


def test_what_hangs_is_killed_by_the_hook_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "_EACH_S", 0.2)
    assert hook.run_command(["sleep", "100000"], {}) == "not ended in 0.2 s, and killed"


def test_a_hook_that_reads_nothing_is_no_error() -> None:
    assert hook.run_command(["true"], {"text": "x" * 1_000_000}) is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"command": []}, "notify.command []: empty; give at least one word"),
    ({"command": "curl"}, "notify.command 'curl': not a list"),
    ({"command": ["a\0"]}, "has a NUL character"),
    ({"url": "ftp://x/y"}, "notify.url 'ftp://x/y': not a web address; write https://host/path without blanks"),
    ({"url": "file:///etc/passwd"}, "not a web address"),
    ({"url": "https://"}, "not a web address"),
    ({"url": "https://a b"}, "not a web address"),
    ({"mail": "x"}, "notify.mail: unknown key"),
]


@pytest.mark.parametrize(("told", "words"), WRONG)
def test_what_is_no_hook_is_refused(told: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(JobConfig, {"command": ["true"], "notify": told}, "job.json")
    assert words in str(caught.value)
