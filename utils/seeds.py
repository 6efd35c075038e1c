"""Explicit randomness: one generator per agent and purpose."""

import hashlib

import torch


def generator(seed: int, agent: int = 0, iteration: int = 0, purpose: str = "") -> torch.Generator:
    """A CPU generator that depends on exactly (seed, agent, iteration, purpose).

    Drawn on the CPU everywhere, so that a run on a GPU shuffles and augments as one on the CPU does.
    """
    key = f"{seed}/{agent}/{iteration}/{purpose}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1)
