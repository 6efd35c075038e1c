import os
import subprocess
import sys

import pytest

# Allocates and frees 64 MiB again and again and prints how often a page had to be fetched. The first rounds do not
# count: until the heap has found its size, small pieces that land in the freed block make the next one a new one.
SCRIPT = """
import resource, sys, torch
from utils.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(30):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    ran = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.long
@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_page_faults():
    assert faults("keep") < faults("default") / 4
