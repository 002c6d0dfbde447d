"""Every editor on a device whose tensors do not mix with the CPU's: what a GPU would refuse."""

import subprocess
import sys

import pytest
from torch.utils import backend_registration

from kmebench.editors.cards import registered


@pytest.mark.integration
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made in Python",
)
def test_no_editor_mixes_devices_or_needs_float64_of_one_without():
    # A process of its own: a device cannot be taken back.
    command = [sys.executable, "-m", "tests.editors.other_device"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    asked = [f"llama {name}" for name, card in registered().items() if not card.control] + [
        "gptj pac",
        "gptj pac-released",
        "gptj lora",
        "gemma3 memit",
        "gemma3 pmet",
    ]
    kinds = ("double", "single")
    assert done.stdout.splitlines() == [f"{kind} {name}" for kind in kinds for name in asked]
