"""One process imports torch and what else is slow to import, and forks for each local job.

Snakemake starts every script in a Python of its own. Importing torch and transformers there takes
about five seconds, longer than many an edit of a small model; pandas and matplotlib take two. So
the scripts of many jobs first call `hand_over`: it sends a script to the server of its Snakemake,
which runs it in a fork that has the imports already, with the same arguments, folder, environment
and open files. The script's own process waits, passes signals on, and ends as the fork ends.
Killing it kills the fork.

Without a server (`--use-conda`, a cluster, a GPU, which no fork may use after its parent has, or an
operating system other than Linux) `hand_over` returns, and the script goes on by itself.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from kmebench.devices import uses_gpu

#: The variable that names the server's socket, and the Python that listens there.
ADDRESS = "KMEBENCH_FORKSERVER"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def start(devices: Iterable[str], threads: int) -> None:
    """Start a server for the jobs of this process, if none of their models uses a GPU.

    It ends when this process does, however that ends. ``threads`` are those of one job: some
    libraries size their pools when they are imported.
    """
    if sys.platform != "linux" or any(map(uses_gpu, devices)):
        return
    address = str(Path(tempfile.mkdtemp(prefix="kmebench-")) / "forkserver")
    library = str(Path(__file__).parents[1])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([library, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(threads),
    }
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        subprocess.Popen(
            [sys.executable, "-m", "kmebench.forkserver", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # its end tells the server that this process has ended
            env=environment,
            start_new_session=True,  # Ctrl-C is for the jobs
        )
    os.environ[ADDRESS] = json.dumps([address, sys.executable])


def hand_over(*modules: str) -> None:
    """Run this script in a fork that has imported ``modules``, and exit as it does.

    Returns where there is no server for this Python.
    """
    address, executable = json.loads(os.environ.pop(ADDRESS, "[null, null]"))
    if executable != sys.executable:
        return
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.connect(address)
        except OSError:
            return
        job = {
            "modules": modules,
            "arguments": sys.argv,
            "path": sys.path,
            "folder": os.getcwd(),
            "environment": dict(os.environ),
        }
        # Until they can be passed on: one that ended this process would leave the fork alone.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(job).encode() + b"\n")
        with server.makefile() as answers:
            _wait(answers)


def _wait(answers: TextIO) -> NoReturn:
    """Pass signals to the fork, and exit with its status."""
    fork = int(answers.readline() or 0)
    passed = []

    def pass_on(number: int, _: FrameType | None) -> None:
        passed.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(fork, number)

    for number in _SIGNALS if fork else ():
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    status = answers.readline()
    if not status and not passed:
        print("The process of this job was killed, perhaps for want of memory.", file=sys.stderr)
    os._exit(int(status or 128 + (passed or [signal.SIGKILL])[-1]))


def serve(listener: socket.socket) -> None:
    """Fork for every script that connects, until standard input ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    gc.disable()  # in forks alone is there garbage
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            job, files = _read(connection)
            if os.fork() == 0:
                listener.close()
                _run(job, files, connection)
            for file in files:
                os.close(file)
    shutil.rmtree(Path(listener.getsockname()).parent)


def _read(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive a job with its open files, and import what it asks for."""
    _, files, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile() as lines:
        job = json.loads(lines.readline())
    for name in job["modules"]:
        with contextlib.suppress(ImportError):  # the script itself tells what is missing
            importlib.import_module(name)
    gc.freeze()  # forks need not search what is imported, nor copy its pages
    return job, files


def _run(job: dict[str, Any], files: Sequence[int], connection: socket.socket) -> NoReturn:
    """Be the script of a job: its files, folder, environment and end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    gc.enable()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv[:], sys.path[:] = job["arguments"], job["path"]
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    connection.sendall(f"{os.getpid()}\n".encode())
    status = _status()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{status}\n".encode())
    os._exit(status)


def _end_with(connection: socket.socket) -> None:
    """End this fork at once when the script's own process is gone."""
    if not connection.recv(1):
        os.kill(os.getpid(), signal.SIGKILL)


def _status() -> int:
    """Run the script as the interpreter would; return its exit status."""
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
