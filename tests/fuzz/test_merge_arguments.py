"""`merge` on what it was not made for: models, or a ValueError or TypeError; and what it was given stays as it was."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from merging import BN_RESETS, METHODS, Matching, merge
from merging.activation_matching import Comparison
from tests.fuzz.damage import OF_TENSORS, WRONG, replaced

IMAGES = [torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(k)) for k in range(2)]
LABELS = torch.arange(4)
ODD: dict[str, list[Any]] = {
    "models_or_states": [None, 5, "models", [], [None], [5], [{}], [None, None], {"a": 1}],
    "weights": [None, 5, "x", [], [[]], [[1]], np.ones((2, 2)), -np.eye(2), np.full((2, 2), math.nan), np.eye(3), {},
                [["a", "b"], ["c", "d"]], [[1, 0], [0]], np.eye(2) * (1 + 1j), torch.eye(2),
                torch.eye(2, device="meta"), torch.eye(2).to_sparse(), [[1e300, 1e300], [0, 1]], [[0, 1], [1, 0]],
                [[1, 0], [0.5, 0.5]]],
    "batches": [None, 5, "x", [], [None], [5], iter(IMAGES), [[]], [()], [{}], [{"image": IMAGES[0]}],
                [(IMAGES[0], LABELS)], [[IMAGES[0], LABELS]], [(LABELS, IMAGES[0])], [("path", IMAGES[0])], IMAGES[0],
                torch.rand(1), [LABELS], [IMAGES[0].double()], [IMAGES[0].half()], [IMAGES[0].byte()],
                [IMAGES[0].numpy()], [IMAGES[0][:0]], [IMAGES[0][:1]], [IMAGES[0][:, :, :2, :2]],
                [IMAGES[0].repeat(1, 3, 1, 1)], [IMAGES[0] * math.nan], [IMAGES[0] * 1e30], [IMAGES[0].to("meta")],
                [torch.zeros_like(IMAGES[0])], [IMAGES[0].to_sparse()], [IMAGES[0], IMAGES[1][:, :, :3]], range(3)],
    "local_batches": [5, [], [None, None], [IMAGES, None], [IMAGES], [IMAGES, [IMAGES[1][:0]]], "xy"],
    "model": [5, "resnet", nn.Linear(2, 2), nn.Identity(), {}, nn.Module(), nn.Sequential],
    "spec": [5, "x", {}, []],
    "matching": [5, "x", {}, Matching, Comparison(),
                 *(Matching(memory=size) for size in (0, -1, 1, 1e300, math.nan, "x", 2**80))],
    "agents": [5, "x", [], [5], [-1], [0.5], [None], {0: 1}, [0, 0], [1], [True], ["0"]],
}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2)).eval()


MODELS = [network(seed) for seed in (0, 1)]
STATES = [model.state_dict() for model in MODELS]
SOUND = {"models_or_states": STATES, "model": MODELS[0], "weights": [[0.5, 0.5], [0.3, 0.7]], "batches": IMAGES}


@st.composite
def odd_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Name -> which of its odd values, of one argument or two, and sound values of others."""
    names = st.sampled_from([*ODD, "states", "method", "bn_reset", "robust", "lent"])
    chosen = {"method": draw(st.sampled_from([*METHODS])), "lent": draw(st.booleans()),
              "bn_reset": draw(st.sampled_from(BN_RESETS))}
    for name in draw(st.lists(names, min_size=1, max_size=2, unique=True)):
        ways = st.lists(st.integers(0, 20), min_size=1, max_size=3)
        chosen[name] = (draw(ways) if name == "states" else None, draw(st.integers(0, 10_000)))
    return chosen


def arguments_of(chosen: dict[str, Any]) -> dict[str, Any]:
    given = dict(SOUND)
    for name, choice in chosen.items():
        if name == "states":
            given["models_or_states"] = replaced(STATES, *choice)
        elif isinstance(choice, tuple):
            values = ODD.get(name, WRONG)
            given[name] = values[choice[1] % len(values)]
        else:
            given[name] = choice
    return given | {"batches": None} if given.get("local_batches") else given


def is_refused_in_a_sentence(given: dict[str, Any]) -> None:
    before = copy.deepcopy((STATES, IMAGES))
    try:
        merged = merge(**given)
    except (ValueError, TypeError) as error:
        assert 10 < len(str(error)) < 1000, str(error)[:2000]
    else:
        wanted = given.get("agents")
        assert [state is not None for state in merged] == [wanted is None or i in wanted for i in range(len(merged))]
    for old, new in zip(before, (STATES, IMAGES), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [40, pytest.param(3000, marks=pytest.mark.long)])
def test_odd_arguments_are_refused_in_a_sentence(examples):
    @settings(max_examples=examples)
    @given(odd_arguments())
    def holds(chosen):
        is_refused_in_a_sentence(arguments_of(chosen))

    holds()


@pytest.mark.filterwarnings("ignore")
def test_every_way_to_damage_a_tensor_gives_something_else():
    for change in OF_TENSORS:
        made = change(torch.ones(2, 3))
        assert not (isinstance(made, torch.Tensor) and made.layout == torch.strided and made.shape == (2, 3)
                    and made.dtype == torch.float32 and not made.is_meta and made.is_contiguous()
                    and not isinstance(made, nn.Parameter) and torch.equal(made, torch.ones(2, 3))), change
