"""Processes side by side: their logs, failures, cores, and what signals do; with a command that starts quickly."""

import json
import os
import signal
import threading
import time

import pytest

from mlo.errors import ConfigError
from mlo.sweeps.processes import Failure, available_cores, error_message, run_processes

QUICK = """
import json
import os
import signal
import sys
import time

print("I am", sys.argv[1])
os.system("echo from below")
match sys.argv[1]:
    case "fails":
        raise ValueError("that is no way\\nto run")
    case "refused":
        print("error: earlier\\nerror: rate: no\\n  such: rate", file=sys.stderr)
        sys.exit(2)
    case "quiet":
        sys.exit(3)
    case "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    case "stopped":
        sys.exit(130)
    case "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    case "saves":
        signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(130)))
about = {"pid": os.getpid(), "cores": sorted(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS")}
about |= {"path": sys.path, "session": os.getsid(0) == os.getpid(), "stdin": sys.stdin.read()}
print(json.dumps(about))
if sys.argv[1] in ("stubborn", "saves"):
    time.sleep(60)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The quick command of an item; its log is named after the item."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "quick.py").write_text(QUICK)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick.py").write_text("raise AssertionError('a module in the current folder was run')")
    return lambda item: (["quick", item], tmp_path / f"{item}.log")


def outcomes(*given, **options):
    """{item: None, or why it failed}, in the order in which the commands ended."""
    found = {}
    run_processes(*given[:2], found.__setitem__, *given[2:], **options)
    return found


def last_line(tmp_path, item):
    return json.loads((tmp_path / f"{item}.log").read_text().splitlines()[-1])


def test_a_process_that_fails_or_dies_does_not_stop_the_others(command, tmp_path, capfd):
    (tmp_path / "refused.log").write_text("an earlier log, without an end of line")
    names = ["one", "fails", "refused", "quiet", "dies", "stopped", "other"]
    assert outcomes(names, command, workers=2) == {
        "one": None,
        "fails": Failure("ValueError: that is no way\nto run"),
        "refused": Failure("rate: no\n  such: rate", refused=True),
        "quiet": Failure("exit code 3"),
        "dies": Failure("killed by signal 9 (Killed)"),
        "stopped": Failure("stopped by a signal from outside"),
        "other": None,
    }
    assert (tmp_path / "fails.log").read_text().startswith("I am fails\nfrom below\nTraceback")
    assert (tmp_path / "refused.log").read_text().startswith("an earlier log, without an end of lineI am refused\n")
    about = last_line(tmp_path, "one")
    assert (about["threads"], about["session"], about["stdin"]) == ("2", True, "")
    assert about["cores"] == sorted(os.sched_getaffinity(0))
    assert not {"", str(tmp_path)} & set(about["path"])
    assert capfd.readouterr() == ("", "")


def test_one_core_each_is_one_core_and_one_thread(command, tmp_path):
    workers = min(2, len(os.sched_getaffinity(0)))
    names = ["a", "b", "c"]
    assert outcomes(names, command, workers, one_core_each=True) == dict.fromkeys(names)
    found = [last_line(tmp_path, name) for name in names]
    assert [(len(about["cores"]), about["threads"]) for about in found] == [(1, "1")] * 3
    assert len({about["cores"][0] for about in found}) == workers
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_an_error_before_its_process_starts_is_the_failure_of_an_item(command):
    def refusing(item):
        if item == "bad":
            raise ConfigError("cannot be created")
        return command(item)

    assert outcomes(["bad", "good"], refusing) == {"bad": Failure("cannot be created"), "good": None}


def wait_for(log):
    """Wait until a command has printed its last line."""
    while not log.exists() or b"}" not in log.read_bytes():
        time.sleep(0.01)


def interrupt(tmp_path, name, number, times=1):
    """Send this process a signal once a command has printed its last line."""

    def send():
        wait_for(tmp_path / f"{name}.log")
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.2)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_all_to_stop_and_starts_no_others(command, tmp_path, number):
    before = signal.getsignal(number)
    interrupt(tmp_path, "saves", number)
    found = {}
    with pytest.raises(KeyboardInterrupt):
        run_processes(["one", "saves", "other"], command, found.__setitem__)
    assert found == {"one": None}
    assert (tmp_path / "saves.log").read_text().endswith("saved\n")
    assert not (tmp_path / "other.log").exists()
    assert signal.getsignal(number) is before


def test_a_second_signal_kills(command, tmp_path):
    interrupt(tmp_path, "stubborn", signal.SIGINT, times=2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        outcomes(["stubborn"], command)
    assert time.monotonic() - start < 30


def test_an_error_of_the_caller_leaves_no_process(command, tmp_path):
    def ended(item, failure):
        assert (item, failure) == ("one", None)
        wait_for(tmp_path / "stubborn.log")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_processes(["one", "stubborn"], command, ended, workers=2)
    with pytest.raises(ProcessLookupError):
        os.kill(last_line(tmp_path, "stubborn")["pid"], 0)


def test_a_system_without_affinity_is_an_error(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    with pytest.raises(ConfigError, match="this system cannot pin a process to a core"):
        available_cores(1)


def test_too_many_workers_for_the_cores_are_an_error(command):
    with pytest.raises(ConfigError, match="5000 workers, but"):
        outcomes(["one"], command, 5000, one_core_each=True)


def test_nothing_to_do_starts_no_process():
    assert outcomes([], print) == {}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", ""),
        ("note: error: in a line\nall is well\n", ""),
        ("error: one\nerror: two: three\n", "two: three"),
        ("error: one\nTraceback (most recent call last):\n  File\n    code\nOSError: [2] no\n", "OSError: [2] no"),
    ],
)
def test_the_error_of_an_output_is_its_last(output, message):
    assert error_message(output) == message
