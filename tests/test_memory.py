from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from instar.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
bytearray(b"x") * (1 << 25)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    bytearray(b"x") * (1 << 25)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    result = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    assert faults("keep") * 20 < faults("return")


RELEASED = """
import psutil
from instar.memory import keep_freed_memory, release_freed_memory

assert keep_freed_memory()
rss = psutil.Process().memory_info
large = bytearray(b"x") * (1 << 26)
del large
held = rss().rss
release_freed_memory()
print(held - rss().rss)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_it_is_given_back_when_asked() -> None:
    result = subprocess.run(
        [sys.executable, "-c", RELEASED], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) > (1 << 26) * 0.9
