"""Out of memory: once more with half, then an error."""

import resource
import subprocess
import sys

import pytest
import torch

from kmebench.memory import NoMemoryError, halved_if_needed


def fits(limit, tried, error):
    def attempt(size):
        tried.append(size)
        if size > limit:
            raise error
        return size

    return attempt


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [(8, 8, [8]), (8, 4, [8, 4]), (9, 4, [9, 4]), (8, 3, [8, 4]), (1, 0, [1])],
)
def test_half_is_tried_once(error, size, limit, expected):
    tried = []
    attempt = fits(limit, tried, error)
    if expected[-1] <= limit:
        assert halved_if_needed(attempt, size, "asking", "lower it") == expected[-1]
    else:
        with pytest.raises(NoMemoryError, match=rf"asking, {expected[-1]} at once \(.*: lower it"):
            halved_if_needed(attempt, size, "asking", "lower it")
    assert tried == expected


def test_other_errors_are_not_tried_again():
    tried = []
    with pytest.raises(RuntimeError, match="shapes"):
        halved_if_needed(fits(0, tried, RuntimeError("shapes")), 8, "asking", "lower it")
    assert tried == [8]


SCRIPT = """
import resource, sys, torch
from kmebench.memory import halved_if_needed
torch.ones(1)
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
found = halved_if_needed(lambda size: torch.empty(size * 2**30, dtype=torch.uint8), 64, "a", "b")
print(len(found) // 2**30)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit of address space here")
@pytest.mark.parametrize(("gib", "says"), [(48, "32"), (24, "Out of memory while a, 32 at once")])
def test_a_real_limit_of_memory(gib, says):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(gib * 2**30)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert says in done.stdout + done.stderr
