"""Which units of a network can trade places: derived from the model by watching it, never typed in by hand.

A hidden layer's units can be reordered without changing the function, provided that every tensor that holds them is
reordered alike. `derive_spec` finds those tensors: it watches a forward pass, follows the units from tensor to tensor
and checks what it found by permuting them. The result is data; `permute` applies it.

All of that is in `merging/tracing`: what a spec is (`spec`), how it is derived (`derive`), checked (`verification`),
and how features are read by it (`features`).

    python -m experiments.groups resnet50
"""

from merging.tracing.derive import derive_spec, spec_from_axes
from merging.tracing.features import FeatureReader, read_units
from merging.tracing.spec import (
    Member,
    Permutations,
    PermutationSpec,
    Read,
    describe,
    identity,
    invert,
    nest,
    permute,
    permute_tensor,
    random_permutations,
)
from merging.tracing.verification import verify
from merging.tracing.watch import UnsupportedOperation

__all__ = ["FeatureReader", "Member", "PermutationSpec", "Permutations", "Read", "UnsupportedOperation", "derive_spec",
           "describe", "identity", "invert", "nest", "permute", "permute_tensor", "random_permutations", "read_units",
           "spec_from_axes", "verify"]
