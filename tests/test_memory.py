"""Out of memory: once more with half, then an error."""

import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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


def eight_quarters(quarters):
    """Ask for 2 GiB where ``quarters`` of a GiB are left; return how many of them fitted."""
    held = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    limit = held + quarters * 2**28
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found = halved_if_needed(lambda size: torch.empty(size * 2**28, dtype=torch.uint8), 8, "a", "b")
    return len(found) // 2**28


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="address space is Linux's here")
def test_a_real_limit_of_memory():
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(mp_context=fork) as pool:
        assert pool.submit(eight_quarters, 6).result() == 4
    with ProcessPoolExecutor(mp_context=fork) as pool:
        small = pool.submit(eight_quarters, 2)
        assert "Out of memory while a, 4 at once" in str(small.exception())
