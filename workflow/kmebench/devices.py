"""Whether a job uses a GPU, asked before anything imports torch."""

import shutil
from pathlib import Path

#: What machines with a GPU of NVIDIA or AMD have: programs, and files of their drivers.
_PROGRAMS = ("nvidia-smi", "rocm-smi")
_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def uses_gpu(device: str, *, elsewhere: bool = False) -> bool:
    """Whether a model on ``device`` (of the config) lies on a GPU.

    ``auto`` is a GPU where this machine has one. Of the machines that run jobs ``elsewhere``
    nothing is known here: there it is one, too.
    """
    return device != "cpu" and (device != "auto" or elsewhere or _has_gpu())


def _has_gpu() -> bool:
    programs, files = map(shutil.which, _PROGRAMS), (Path(path).exists() for path in _FILES)
    return any(programs) or any(files)
