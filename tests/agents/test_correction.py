"""What agents keep of their drift: in their own order of units, through merges of all kinds."""

import numpy as np
import pytest
import torch

from agents.correction import KEPT_OF_ANOTHER_TIME, KEPT_OUT_OF_STEP, DriftCorrection
from merging import merge
from merging.batch_norm import reestimate
from merging.permutation import derive_spec, permute, random_permutations
from models import build_model
from optimizers.corrections import CORRECTIONS

IMAGES = [torch.rand(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))]


def resnet(seed: int):
    return build_model("resnet20", 10, in_channels=1, image_size=8, width_multiplier=1, seed=seed)


@pytest.fixture(scope="module")
def spec():
    return derive_spec(resnet(0), IMAGES[0])


def after_a_merge(rule: str, spec, begun: list[dict], states: list[dict], weights, method: str) -> DriftCorrection:
    correction = DriftCorrection(CORRECTIONS[rule], resnet(0), spec)
    correction.begin(dict(enumerate(begun)))
    models = correction.without_walks({i: correction.with_walk(i, state) for i, state in enumerate(states)})
    assert all(models[i].keys() == states[i].keys() for i in models)
    merged = merge([models[i] for i in sorted(models)], weights, method=method, batches=IMAGES, model=resnet(0),
                   spec=spec, bn_reset="none")
    correction.update(models, models, np.array(weights), merged)
    return correction


def size(y: dict) -> float:
    return max(float(t.abs().max()) for t in y.values())


@pytest.mark.parametrize("rule", CORRECTIONS)
@pytest.mark.parametrize("weights", [[[0.5, 0.5], [0.5, 0.5]], [[0.6, 0.4], [0.4, 0.6]]], ids=["shared", "own order"])
def test_an_agent_with_its_units_in_another_order_has_not_drifted(rule, weights, spec):
    """Matching finds the order, so that nothing is left to correct; averaged as they are, the two differ."""
    # Fresh statistics: without them some units are 0 for all images, and no match can tell them apart.
    first, second = (reestimate(resnet(0), resnet(seed).state_dict(), IMAGES) for seed in (0, 1))
    order = random_permutations(spec, torch.Generator().manual_seed(1))
    begun, states = ([state, permute(spec, order, state)] for state in (first, second))
    same = after_a_merge(rule, spec, begun, states, weights, "DIMAT")
    apart = after_a_merge(rule, spec, begun, states, weights, "WA")
    for i in (0, 1):
        assert size(same.y[i]) < 1e-6 < 1e-2 < size(apart.y[i])


@pytest.mark.parametrize("rule", CORRECTIONS)
def test_what_all_agents_correct_by_adds_up_to_nothing(rule, spec):
    states = [resnet(i).state_dict() for i in range(3)]
    begun = [resnet(10).state_dict()] * 3
    weights = [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]
    correction = after_a_merge(rule, spec, begun, states, weights, "WA")
    for name in correction.names:
        assert sum(correction.y[i][name] for i in range(3)).abs().max() < 1e-6
    parameters = {name for name, _ in resnet(0).named_parameters()}
    assert set(correction.names) == parameters  # BatchNorm's statistics aren't corrected


def test_y_and_the_walk_move_with_the_units(spec):
    states = [resnet(i).state_dict() for i in range(2)]
    weights = [[0.6, 0.4], [0.4, 0.6]]
    correction = after_a_merge("KGT", spec, [resnet(5).state_dict()] * 2, states, weights, "WA")
    correction.begin({0: states[0]})
    order = random_permutations(spec, torch.Generator().manual_seed(1))
    y, since = dict(correction.y[0]), dict(correction.since[0])
    correction.reorder(0, order)
    full = {name: torch.zeros(()) for name in spec.of_tensor}
    for kept, before in ((correction.y[0], y), (correction.since[0], since)):
        buffers = {name: states[0][name] for name in full.keys() - before.keys()}
        expected = permute(spec, order, before | buffers)
        assert all(torch.equal(t, expected[name]) for name, t in kept.items())
    assert not torch.equal(correction.y[0]["conv1.weight"], y["conv1.weight"])


def test_a_walk_has_a_length(spec):
    state = resnet(0).state_dict()
    correction = DriftCorrection(CORRECTIONS["KGT"], resnet(0), spec)
    assert correction.walk_of(1, state) == 0
    correction.begin({1: state})
    correction.without_walks({1: correction.with_walk(1, {name: t * 3 for name, t in state.items()})})
    assert correction.walk_of(1, state) == pytest.approx(2)


def test_a_step_takes_its_share(spec):
    states = [resnet(i).state_dict() for i in range(2)]
    correction = after_a_merge("LED", spec, states, states, [[0.6, 0.4], [0.4, 0.6]], "WA")
    model = resnet(0)
    correct = correction.step(0, model, steps=4)
    for _ in range(4):
        correct()
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, states[0][name] - correction.y[0][name], atol=1e-6)
    assert DriftCorrection(CORRECTIONS["LED"], model, None).step(0, model, 4) is None


def test_out_of_step_an_agent_forgets_a_part_of_its_y(spec):
    states, weights = [resnet(i).state_dict() for i in range(2)], [[0.6, 0.4], [0.4, 0.6]]
    correction = after_a_merge("LED", spec, states, states, weights, "WA")
    before = {i: dict(y) for i, y in correction.y.items()}
    merged = merge(states, weights, method="WA", batches=IMAGES, model=resnet(0), spec=spec, bn_reset="none")
    correction.update([0, 1], dict(enumerate(states)), np.array(weights), merged, in_step=False)
    for i, y in correction.y.items():
        for name, t in y.items():
            expected = KEPT_OUT_OF_STEP * before[i][name] + states[i][name] - merged[i][name]
            assert torch.allclose(t, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", CORRECTIONS)
@pytest.mark.parametrize(("method", "weights", "concerned"), [
    ("WA", [[0.6, 0.4, 0], [0.4, 0.2, 0.4], [0, 0.4, 0.6]], [1, 2]), ("DIMAT", np.full((3, 3), 1 / 3), [0, 1, 2])])
def test_a_model_of_another_iteration_teaches_nothing_of_drift(rule, method, weights, concerned, spec):
    """Who merges it keeps half of its y, in the order of units of its merged model; others go on as they would."""
    states, weights = [resnet(i).state_dict() for i in range(3)], np.array(weights)
    begun = [resnet(5).state_dict()] * 3
    late, punctual = (after_a_merge(rule, spec, begun, states, weights, method) for _ in range(2))
    before = {i: dict(y) for i, y in late.y.items()}
    merged = merge(states, weights, method=method, batches=IMAGES, model=resnet(0), spec=spec, bn_reset="none")
    for correction, which in ((late, [2]), (punctual, [])):
        correction.begin(dict(enumerate(begun)))
        models = correction.without_walks({i: correction.with_walk(i, state) for i, state in enumerate(states)})
        correction.update(range(3), models, weights, merged, in_step=False, untimely=which)
    for i in range(3):
        half = DriftCorrection(CORRECTIONS[rule], resnet(0), spec)
        half.y[i] = {name: KEPT_OF_ANOTHER_TIME * t for name, t in before[i].items()}
        if merged.moved(i):
            half.reorder(i, merged.moved(i))
        expected = half.y[i] if i in concerned else punctual.y[i]
        assert all(torch.equal(t, expected[name]) for name, t in late.y[i].items())
    assert not torch.equal(late.y[1]["conv1.weight"], punctual.y[1]["conv1.weight"])
    assert any(merged.moved(i) for i in range(3)) == (method == "DIMAT")


def test_who_has_no_step_in_a_part_of_an_epoch_is_corrected_at_once(spec):
    states = [resnet(i).state_dict() for i in range(2)]
    correction = after_a_merge("LED", spec, states, states, [[0.6, 0.4], [0.4, 0.6]], "WA")
    model = resnet(0)
    assert correction.step(0, model, steps=0) is None
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, states[0][name] - correction.y[0][name], atol=1e-6)


@pytest.mark.parametrize("change", [lambda y: y.pop("conv1.weight"), lambda y: y.update({"more": torch.zeros(1)}),
                                    lambda y: y.update({"conv1.weight": torch.zeros(2)})])
def test_a_correction_of_another_model_is_refused(change, spec):
    states = [resnet(i).state_dict() for i in range(2)]
    correction = after_a_merge("KGT", spec, states, states, [[0.6, 0.4], [0.4, 0.6]], "WA")
    other = DriftCorrection(CORRECTIONS["KGT"], resnet(0), spec)
    other.take_up(0, saved := correction.saved(0), states[0])
    assert all(torch.equal(t, correction.y[0][name]) for name, t in other.y[0].items())
    change(saved["correction"])
    with pytest.raises(ValueError, match=r"agent 0's correction .* another model"):
        other.take_up(0, saved, states[0])
