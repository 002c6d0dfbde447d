"""A script run in a fork behaves as one run by itself: streams, status, signals, end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kmebench import devices, forkserver

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are for Linux")

SCRIPT = """
import os, sys
from kmebench.forkserver import hand_over
hand_over("wave", "no_such_module")
import signal, subprocess, time
print(json_of({"parent": os.getppid(), "arguments": sys.argv[1:], "folder": os.getcwd(),
               "mark": os.environ.get("MARK"), "loaded": "wave" in sys.modules,
               "address": os.environ.get("KMEBENCH_FORKSERVER"), "name": __name__}), flush=True)
BODY
""".replace("json_of", "__import__('json').dumps")


@pytest.fixture
def server(monkeypatch):
    """A server that lives as long as a process of the test's own, which is killed at the end."""
    starter = "from kmebench import forkserver; import os, time; forkserver.start(['cpu'], 1)"
    shown = f"{starter}; print(os.environ['KMEBENCH_FORKSERVER'], flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", shown], stdout=subprocess.PIPE, text=True)
    address = owner.stdout.readline().strip()
    monkeypatch.setenv(forkserver.ADDRESS, address)
    yield owner
    owner.kill()
    owner.wait()
    _until(lambda: not Path(json.loads(address)[0]).parent.exists())  # it cleans up


def _until(true, seconds=60):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path):
    def start(body="", **options):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.replace("BODY", body))
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, str(script), "a b"], **streams, **options)

    return start


def _ended(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out.splitlines(), err


def test_the_fork_has_the_scripts_arguments_folder_environment_and_streams(server, start, tmp_path):
    status, out, err = _ended(start(cwd=tmp_path, env={**os.environ, "MARK": "here"}))

    told = json.loads(out[0])
    assert (status, err) == (0, "")
    assert told["loaded"]
    assert told["parent"] not in (os.getpid(), server.pid)
    assert (told["arguments"], told["folder"]) == (["a b"], str(tmp_path))
    assert (told["mark"], told["address"], told["name"]) == ("here", None, "__main__")


def test_without_a_server_or_with_another_ones_python_the_script_goes_on_itself(
    start, monkeypatch, tmp_path
):
    for address in (None, [str(tmp_path / "gone"), sys.executable], ["/x", "/other/python"]):
        if address:
            monkeypatch.setenv(forkserver.ADDRESS, json.dumps(address))
        status, out, err = _ended(start("sys.exit(3)"))
        told = json.loads(out[0])
        assert (status, told["parent"], told["loaded"], err) == (3, os.getpid(), False, "")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("sys.exit(7)", 7, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no room')", 1, "no room\n"),
        ("sys.exit(subprocess.run(['false']).returncode)", 1, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import no_such_module", 1, "ModuleNotFoundError"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed, perhaps for want of memory"),
    ],
)
def test_the_script_ends_as_it_would_by_itself(server, start, body, status, message):
    ended, _, err = _ended(start(body))
    assert ended == status
    assert message in err if message else err == ""


def test_a_signal_before_the_fork_is_known_reaches_it_too(monkeypatch, tmp_path, start):
    fork = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "server"))
        listener.listen()
        address = json.dumps([str(tmp_path / "server"), sys.executable])
        monkeypatch.setenv(forkserver.ADDRESS, address)
        process = start()
        connection, _ = listener.accept()
        with connection, connection.makefile("rw") as stream:
            stream.readline()
            stream.readline()  # the job has been handed over
            process.terminate()
            time.sleep(0.2)
            assert process.poll() is None
            print(fork.pid, file=stream, flush=True)
            assert fork.wait(timeout=10) == -signal.SIGTERM
    assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_a_signal_reaches_the_script(server, start):
    process = start(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))\n"
        "print('ready', flush=True)\n"
        "time.sleep(30)"
    )
    process.stdout.readline()
    process.stdout.readline()
    process.terminate()
    assert _ended(process)[0] == 5


def test_a_signal_that_the_script_does_not_handle_ends_it_without_a_word_about_memory(
    server, start
):
    process = start("time.sleep(30)")
    process.stdout.readline()
    process.terminate()
    status, _, err = _ended(process)
    assert (status, err) == (128 + signal.SIGTERM, "")


def test_killing_the_scripts_own_process_kills_the_fork(server, start):
    process = start("print(os.getpid(), flush=True); time.sleep(30)")
    process.stdout.readline()
    fork = int(process.stdout.readline())
    process.kill()
    _until(lambda: not Path(f"/proc/{fork}").exists())


def test_a_fork_outlives_the_owner_of_its_server_as_a_script_would(server, start):
    process = start(
        "print('ready', flush=True); sys.stdin.readline(); print('done')", stdin=subprocess.PIPE
    )
    process.stdout.readline()
    process.stdout.readline()
    server.kill()
    server.wait()
    assert process.communicate("go on\n", timeout=30)[0] == "done\n"


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "balanced"])
def test_no_server_where_jobs_may_use_a_gpu(device, monkeypatch):
    monkeypatch.delenv(forkserver.ADDRESS, raising=False)
    forkserver.start(["cpu", device], 1)
    assert forkserver.ADDRESS not in os.environ


def test_no_server_for_auto_beside_a_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv(forkserver.ADDRESS, raising=False)
    monkeypatch.setattr(devices, "_FILES", (str(tmp_path),))
    forkserver.start(["auto"], 1)
    assert forkserver.ADDRESS not in os.environ
