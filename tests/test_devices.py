"""Whether a job uses a GPU: as the config says, as this machine has one, or as another may."""

import pytest

from kmebench import devices
from kmebench.devices import uses_gpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine that has these programs and files of drivers."""

    def has(*names):
        for name in names:
            (tmp_path / name).touch(mode=0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        files = tuple(tmp_path / path.rpartition("/")[2] for path in devices._FILES)
        monkeypatch.setattr(devices, "_FILES", files)

    return has


@pytest.mark.parametrize(
    ("there", "auto"),
    [((), False), *(((name,), True) for name in ("nvidia-smi", "rocm-smi", "kfd", "nvidiactl"))],
)
def test_auto_is_a_gpu_where_there_is_one_of_nvidia_or_amd(there, auto, machine):
    machine(*there)
    assert uses_gpu("auto") == auto
    for device in ("cuda", "cuda:1", "balanced", "sequential", "mps"):
        assert uses_gpu(device)
    assert not uses_gpu("cpu")


def test_elsewhere_auto_is_a_gpu_and_the_cpu_is_none(machine):
    machine()
    assert uses_gpu("auto", elsewhere=True)
    assert not uses_gpu("cpu", elsewhere=True)
