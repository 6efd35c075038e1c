import os
import subprocess
import sys

import pytest

from utils import memory
from utils.memory import usable_memory

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


@pytest.mark.parametrize(("membership", "limits", "usable"), [
    ("0::/job/step\n", {"job/memory.max": 300, "job/step/memory.max": "max", "memory.max": 400}, 300),
    ("0::/job/step\n", {"job/memory.max": 300, "job/step/memory.max": 200}, 200),
    ("0::/where/the/host/has/it\n", {"memory.max": 400}, 400),
    ("3:cpuset:/\n2:memory:/docker/ab:c\n0::/\n", {"memory/memory.limit_in_bytes": 300}, 300),
    ("2:memory:/job\n", {"memory/memory.limit_in_bytes": 2**63 - 4096, "memory/job/memory.limit_in_bytes": 7}, 7),
    ("0::/job\n", {"job/memory.max": 5000}, 1000), ("0::/\n", {}, 1000), ("0::/\n", {"memory.max": "strange"}, 1000),
    ("1:name=systemd:/\nnothing\n", {}, 1000), (None, {}, 1000),
])
def test_memory_is_what_the_control_group_leaves_of_it(tmp_path, monkeypatch, membership, limits, usable):
    for name, value in limits.items():
        (file := tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(memory, "_physical_memory", lambda: 1000.0)
    assert usable_memory.__wrapped__() == usable  # it is asked for once in a process
