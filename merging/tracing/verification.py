"""The check of a spec: permuting the units of every group must leave the outputs alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from merging.tracing.running import DoesNotRun, DoublePrecision, Slots, is_mixed, own_copy, run, unwrapped
from merging.tracing.spec import PermutationSpec, identity, permute, random_permutations
from merging.tracing.watch import tensors_of, tensors_within

Example = Tensor | Sequence[Any] | Mapping[str, Any]
Choice = str | int | Callable[[Any], Any]
T = TypeVar("T")


class Arguments(NamedTuple):
    """What a forward pass is called with."""

    args: tuple
    kwargs: dict[str, Any]
    outputs: Choice | None = None
    as_it_is: bool = False  # how many rows its tensors have stays

    def chosen(self, results: Any) -> Any:
        """What of a forward pass's results counts."""
        if self.outputs is None:
            return results
        try:
            if callable(self.outputs):
                return self.outputs(results)
            by_key = isinstance(self.outputs, int) or isinstance(results, Mapping)
            return results[self.outputs] if by_key else getattr(results, self.outputs)
        except Exception as error:
            raise ValueError(f"outputs={self.outputs!r} can't be taken from the {type(results).__name__} that the "
                             f"model puts out: {error}") from error


def arguments(example: Example, kwargs: Mapping[str, Any] | None = None, outputs: Choice | None = None) -> Arguments:
    """A tensor, a tuple or list of arguments, or a dict of keyword arguments; and keyword arguments besides."""
    if isinstance(example, Arguments):
        return example
    if isinstance(example, Mapping):
        args, kwargs = (), {**example, **(kwargs or {})}
    elif isinstance(example, (tuple, list)):
        args = tuple(example)
    elif isinstance(example, Tensor):
        args = (example,)
    else:
        raise ValueError(f"an example is a tensor, a tuple of the forward pass's arguments or a dict of its keyword "
                         f"arguments, not a {type(example).__name__}")
    return Arguments(args, dict(kwargs or {}), outputs)


def with_rows_as_it_takes(example: Arguments, job: Callable[[Arguments], T]) -> T:
    """The job done with the example or, where the model doesn't run on other numbers of rows, with as many as it has:
    an image in a list has its channels in the first dimension."""
    try:
        return job(example)
    except DoesNotRun:
        if example.as_it_is:
            raise
        return job(example._replace(as_it_is=True))


def verify(model: nn.Module, spec: PermutationSpec, example: Example, tolerance: float = 1e-9,
           kwargs: Mapping[str, Any] | None = None, outputs: Choice | None = None) -> float:
    """Check that permuting the units of every group leaves the function alone; the relative error of the outputs.

    On a copy in float64 on the CPU, with random inputs, and random values instead of constant ones in its tensors (as a
    fresh BatchNorm has them), which would hide a fault. Inputs are standard normal; where these don't give finite
    outputs (a logarithm), uniform between 0 and 1, or else close to the example. What the network asks for in a lower
    precision is in float64 as well. A network that can't run so is checked as it is, where it is; then `tolerance` is a
    hundred times what rounding its tensors to their precision does to the outputs.
    Each output tensor is compared on its own. The example, its kwargs and outputs: as in `derive_spec`.

    Raises ValueError, naming a group at fault, if the outputs differ by more than `tolerance`, and where they can't be
    compared: there are none, none is finite, their number varies, they don't depend on what is permuted, or they depend
    on more than inputs and tensors.
    """
    model = unwrapped(model)
    return with_rows_as_it_takes(arguments(example, kwargs, outputs),
                                 lambda given: _verified(model, spec, given, tolerance))


def _verified(model: nn.Module, spec: PermutationSpec, example: Arguments, tolerance: float) -> float:
    def in_double() -> nn.Module:
        return own_copy(model).cpu().double()

    with suppress(ValueError):  # one sample is half the work, and two are only needed to say what is wrong
        return _verify(model, spec, example, in_double, tolerance, number=1)
    try:
        return _verify(model, spec, example, in_double, tolerance)
    except DoesNotRun as failure:
        try:
            return _verify(model, spec, example, lambda: own_copy(model), None)
        except DoesNotRun:
            raise failure from None


def _verify(original: nn.Module, spec: PermutationSpec, example: Arguments, fresh: Callable[[], nn.Module],
            tolerance: float | None, number: int = 2) -> float:
    """See `verify`. fresh() is a copy to check, in float64; or, with a tolerance of None, as it is."""
    kind, noise = type(original).__name__, torch.Generator().manual_seed(1)
    passes = _Passes(kind, fresh(), example, tolerance is not None, noise, number)
    state = passes.state
    if tolerance is None:
        rounded, coarsest = _rounded(state, noise)
        tolerance = 100 * max(passes.error(rounded), coarsest)
        if not tolerance <= 1e-2:
            raise DoesNotRun(f"the outputs of {kind} depend too much on rounding to check a spec by")
    permutations = random_permutations(spec, noise)
    permuted = permute(spec, permutations, state)
    worst = passes.error(permuted)
    if worst <= tolerance:
        if spec.sizes and not passes.depend_on(spec, tolerance, noise):
            raise ValueError(f"the outputs of {kind} do not depend on the tensors that are permuted, so there is "
                             "nothing to check a spec by: pass an example of inputs whose outputs do")
        return worst
    if not passes.error(state, fresh()) <= tolerance:
        raise ValueError(f"{kind} puts out other values for the same inputs and tensors in evaluation mode: a spec can "
                         "be checked where its forward pass neither draws random numbers nor changes tensors")
    if passes.error(permuted, fresh()) <= tolerance:
        raise ValueError(f"{kind} keeps values from one forward pass to the next that belong to the tensors it had "
                         "then, as a cache does: switch that off for merging")
    nothing = identity(spec)
    for group in spec.sizes:
        together = {group, spec.blocks.get(group, group)}
        together |= {other for other, outer in spec.blocks.items() if outer in together}
        error = passes.error(permute(spec, nothing | {name: permutations[name] for name in together}, state))
        if not error <= tolerance:
            raise ValueError(f"permuting the units of group {group!r} changes the outputs by {error:.1e} (relative): "
                             f"the spec does not fit {kind}")
    raise ValueError(f"permuting all groups changes the outputs by {worst:.1e} (relative)")


class _Passes:
    """What a network puts out with other tensors in it, on inputs that it puts out numbers for: the same in all passes.

    state: its own tensors, made unlike each other. expected: the outputs with these.
    """

    def __init__(self, kind: str, model: nn.Module, example: Arguments, wide: bool, noise: torch.Generator,
                 number: int):
        self.kind, self.model, self.wide = kind, model, wide
        self.state = model.state_dict()
        _make_unlike(self.state, noise)
        finite = self._draw(example, number)
        few = sum(map(len, self.expected)) < 1000
        if finite and few and all(torch.equal(y, y.round()) for y in self.expected):  # classes: two say little
            finite = self._draw(example, 64)
        if not finite:
            what = "only NaN and infinite values" if any(map(len, self.expected)) else "no values"
            raise ValueError(f"{kind} puts out {what}, so there is nothing to check a spec by: pass an example of "
                             "inputs that it puts out numbers for")

    def _draw(self, example: Arguments, number: int) -> int:
        """Sets inputs and expected outputs; how many of these are finite, the most that could be had."""
        tried = []
        for draw in (_normal, _uniform, _near):
            self.inputs = samples(self.model, example, number, draw=draw)
            expected = self.outputs(self.state)
            tried.append((sum(int(y.isfinite().sum()) for y in expected), self.inputs, expected))
            if tried[-1][0] == sum(map(len, expected)):
                break
        finite, self.inputs, self.expected = max(tried, key=lambda one: one[0])
        return finite

    @torch.no_grad()
    def outputs(self, state: Mapping[str, Any], model: nn.Module | None = None) -> list[Tensor]:
        model = model or self.model
        Slots(model).put(state)
        results = run(model, *self.inputs.args, keywords=self.inputs.kwargs,
                      within=DoublePrecision() if self.wide else None, what="inputs")
        return [(torch.view_as_real(y) if y.is_complex() else y).double().flatten().cpu()
                for y in tensors_within(self.inputs.chosen(results))]

    def error(self, state: Mapping[str, Any], model: nn.Module | None = None) -> float:
        """How far the outputs are from the expected ones; ValueError where they are more or fewer."""
        found = self.outputs(state, model)
        sizes, expected = ([len(y) for y in outputs] for outputs in (found, self.expected))
        if sizes != expected:
            raise ValueError(f"{self.kind} puts out {sum(expected)} numbers in {len(expected)} tensors at one time and "
                             f"{sum(sizes)} in {len(sizes)} at another, for the same inputs: no spec can be checked by "
                             "outputs whose number varies, with the values of tensors or at random")
        return _error(found, self.expected)

    def depend_on(self, spec: PermutationSpec, tolerance: float, noise: torch.Generator) -> bool:
        """Whether other values in the tensors that the spec permutes change the outputs."""
        numbers = {name: tensor for name, tensor in _numbers(self.state).items() if spec.of_tensor[name]}
        vectors = {name: tensor for name, tensor in numbers.items() if tensor.ndim == 1}
        # Few bytes often do; a choice of the largest may come out the same by chance.
        for tried in filter(None, (vectors, *[numbers] * 5)):
            other = {name: t * torch.randn((len(t), *(1,) * (t.ndim - 1)), generator=noise).to(t)
                     for name, t in tried.items()}
            try:
                found = self.outputs(self.state | other)
            except DoesNotRun:
                return True
            if [len(y) for y in found] != [len(y) for y in self.expected] or not _error(
                    found, self.expected) <= tolerance:
                return True
        return False


def _make_unlike(state: Mapping[str, Any], noise: torch.Generator) -> None:
    """Adds noise to the tensors of a state dict that are vectors or constant, in place: equal values hide faults."""
    for name, tensor in _numbers(state).items():
        if tensor.numel() > 1 and (tensor.ndim == 1 or tensor.min() == tensor.max()):
            spread = float(tensor.std())
            scale = 0.1 * (spread if spread > 0 else float(tensor.abs().mean()) or 1.0)
            positive = name.endswith("running_var")
            noisy = torch.randn(tensor.shape, generator=noise, dtype=torch.float64).mul_(scale)
            tensor += (noisy.abs() if positive else noisy).to(tensor)


def _rounded(state: Mapping[str, Any], noise: torch.Generator) -> tuple[dict[str, Any], float]:
    """A state dict whose numbers are off by about their precision, and the coarsest of these."""
    off = {name: torch.finfo(tensor.dtype).eps for name, tensor in _numbers(state).items()}
    return {name: tensor * (1 + off[name] * torch.randn(tensor.shape, generator=noise).to(tensor)) if name in off
            else tensor for name, tensor in state.items()}, max(off.values(), default=0.0)


def _numbers(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if is_mixed(name, tensor) and tensor.is_floating_point()}


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the output tensors' relative errors; infinite where something not finite isn't what it was."""
    differences, sizes = [], []
    for y, right in zip(found, expected, strict=True):
        finite = right.isfinite()
        if not torch.allclose(y[~finite], right[~finite], equal_nan=True):
            return math.inf
        differences.append(float((y[finite] - right[finite]).norm()))
        sizes.append(float(right[finite].norm()))
    least = max(1e-4 * math.hypot(*sizes), 1e-300)  # a small output may be nothing but the rounding of large ones
    return max(difference / max(size, least) for difference, size in zip(differences, sizes, strict=True))


def _normal(x: Tensor, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=noise)


def _uniform(x: Tensor, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=noise)


def _near(x: Tensor, shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    """The example's own values, each up to a tenth larger: equal ones would hide faults."""
    return x.detach().cpu()[torch.arange(shape[0]) % len(x)] * (1 + 0.1 * torch.rand(shape, generator=noise))


def samples(model: nn.Module, example: Example, number: int = 2, draw: Callable[..., Tensor] = _normal) -> Arguments:
    """Inputs of several samples, so that the batch doesn't pass for a dimension of length 1."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    noise = torch.Generator().manual_seed(0)
    example = arguments(example)
    rows = next((len(x) for x in tensors_of(example) if x.ndim), 0)

    def sample(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        shape = (number if len(x) == rows and not example.as_it_is else len(x), *x.shape[1:])
        if x.is_floating_point() or x.is_complex():
            return draw(x, shape, noise).to(like.device, like.dtype if x.is_floating_point() else x.dtype)
        top = int(x.max()) + 1 if x.numel() and x.dtype != torch.bool else 1  # numbers as large as the example's
        return torch.randint(max(top, 1), shape, generator=noise).to(like.device, x.dtype)

    return example._replace(args=tree_map(sample, example.args), kwargs=tree_map(sample, example.kwargs))
