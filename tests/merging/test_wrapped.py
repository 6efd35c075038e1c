"""Models in what people wrap them in: DataParallel, torch.compile, torch.jit, quantisation."""

import pytest
import torch
from torch import nn

from merging import METHODS, merge
from merging.permutation import UnsupportedOperation, derive_spec, verify

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"),
              pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]

IMAGES = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
HALVES = [[0.5, 0.5], [0.4, 0.6]]
WAYS = [name for name, way in METHODS.items() if not way.aligned]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Sequential(nn.ReLU(), nn.Linear(8, 3))).eval()


def compiled(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {"module.": nn.DataParallel, "_orig_mod.": compiled, "": in_place,
            "module._orig_mod.": lambda m: nn.DataParallel(compiled(m)),
            "_orig_mod.module.": lambda m: compiled(nn.DataParallel(m))}


@pytest.mark.parametrize("prefix", WRAPPERS)
@pytest.mark.parametrize("method", WAYS)
def test_wrapped_models_merge_as_what_is_within(prefix, method):
    wrap = WRAPPERS[prefix]
    models = [wrap(network(seed)) for seed in range(2)]
    for model in models:
        model(IMAGES)
    expected = merge([network(0), network(1)], HALVES, method, batches=[IMAGES], bn_reset="repair")
    states = [model.state_dict() for model in models]
    for given, model in ((models, None), (states, network()), (states, models[0]), ([models[0], network(1)], None)):
        merged = merge(given, HALVES, method, batches=[IMAGES], model=model, bn_reset="repair")
        for k, one in enumerate(merged):
            own = "" if isinstance(given[k], nn.Sequential) else prefix
            assert list(one) == [own + key for key in expected[k]]
            for key, value in expected[k].items():
                torch.testing.assert_close(one[own + key], value)
    models[0].load_state_dict(merge(models, HALVES, method, batches=[IMAGES])[0])
    spec, plain = derive_spec(models[0], IMAGES[:1]), derive_spec(network(), IMAGES[:1])
    assert spec.sizes == plain.sizes == {"0": 8} and spec.tensors == plain.tensors
    assert verify(models[0], spec, IMAGES[:1]) < 1e-9


@pytest.mark.parametrize("wrap", [compiled, nn.DataParallel, in_place])
def test_parts_that_are_wrapped_keep_their_names(wrap):
    models = [network(seed) for seed in range(2)]
    for model in models:
        model[2] = wrap(model[2])
    assert derive_spec(models[0], IMAGES[:1]).sizes == {"0": 8}
    models[0].load_state_dict(merge(models, HALVES, batches=[IMAGES])[0])


def test_compiled_functions_run_as_they_were_written():
    class Gated(nn.Sequential):
        def forward(self, x):
            return torch.compile(lambda y: super(Gated, self).forward(y), backend="eager")(x)

    assert derive_spec(Gated(*network()), IMAGES[:1]).sizes == {"0": 8}


def test_a_network_whose_part_is_called_module_is_itself():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = network()

        def forward(self, x):
            return self.module(x)

    merged = merge([Part(), nn.DataParallel(Part())], HALVES, batches=[IMAGES])
    assert [next(iter(state)) for state in merged] == ["module.0.weight", "module.module.0.weight"]


def quantised(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.parametrize(("wrap", "what"), [
    (torch.jit.script, "scripted or traced"), (lambda model: torch.jit.trace(model, IMAGES[:2]), "scripted or traced"),
    (quantised, "quantised"),
])
def test_what_cannot_be_watched_is_named(wrap, what):
    whole, part = wrap(network()), network()
    part[2] = wrap(part[2]) if what == "quantised" else torch.jit.script(part[2])
    for model in (whole, part):
        with pytest.raises(UnsupportedOperation, match=f" is {what}.* be watched at work: pass the model that it was"):
            derive_spec(model, IMAGES[:1])
        with pytest.raises(ValueError, match=f" is {what}.* made from"):
            merge([model, model], HALVES, batches=[IMAGES])
    if what == "quantised":
        with pytest.raises(ValueError, match="is quantised: merge the models that these were made from"):
            merge([whole, whole], HALVES, "WA", bn_reset="none")


def test_an_output_that_was_made_unseen_is_refused():
    scripted = torch.jit.script(swish)

    class Swish(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 8)

        def forward(self, x):
            return scripted(self.a(x))

    with pytest.raises(UnsupportedOperation, match=r"the output meets a tensor .* made where it can't be seen"):
        derive_spec(Swish(), IMAGES[:1])


def swish(x):
    return x * torch.sigmoid(x)
