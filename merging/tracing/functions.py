"""Torch's functions, sorted by what they do to the entries of their tensors.

Names are those that `merging.tracing.watch.function_name` gives: in-place functions without their underscore.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _words(
    "relu relu6 threshold hardtanh leaky_relu elu selu celu gelu silu mish softplus softsign logsigmoid sigmoid "
    "hardsigmoid hardswish hardshrink softshrink tanhshrink tanh rrelu clamp clamp_min clamp_max clip abs exp expm1 "
    "log log1p log2 sqrt rsqrt square neg positive reciprocal sin cos erf sign round floor ceil nan_to_num "
    "add sub mul div multiply divide subtract true_divide floor_divide rsub maximum minimum fmax fmin pow float_power "
    "fmod remainder atan2 lerp addcmul addcdiv where masked_fill eq ne gt ge lt le and or xor invert logical_and "
    "logical_or logical_not isfinite isnan isinf "
    "exp2 log10 logaddexp logaddexp2 xlogy sinc tan asin acos atan sinh cosh asinh acosh atanh erfc erfinv lgamma frac "
    "trunc sgn heaviside copysign hypot deg2rad rad2deg imag angle conj conj_physical resolve_conj complex polar "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "clone contiguous detach to type float double half bfloat16 cpu cuda type_as requires_grad data real alias "
    "zeros_like ones_like full_like copy zero fill"
)

FILLED = _words("zeros ones full new_zeros new_ones new_full")
CONSTANTS = _words("new_zeros new_ones new_full new_empty new_tensor empty_like rand_like randn_like")
UNARY_VIEWS = _words("contiguous to type float double half bfloat16 cpu cuda type_as requires_grad_")
REDUCE = _words("mean sum amax amin prod var std norm logsumexp max min median nanmean var_mean std_mean all any "
                "count_nonzero")
WHOLE_AXES = _words("transpose permute movedim moveaxis swapaxes swapdims t T mT squeeze unsqueeze")
MOVE_SEVERAL = _words("cat concat concatenate stack hstack vstack dstack meshgrid")
MOVES = MOVE_SEVERAL | WHOLE_AXES | _words(
    "view reshape flatten unflatten H mH "
    "expand expand_as broadcast_to repeat tile repeat_interleave chunk split split_with_sizes tensor_split unbind "
    "getitem select narrow index_select flip fliplr flipud roll rot90 hsplit vsplit dsplit pixel_shuffle "
    "pixel_unshuffle channel_shuffle native_channel_shuffle unfold diagonal ravel view_as reshape_as as_strided "
    "take_along_dim gather atleast_1d atleast_2d"
)
READ_BEFORE = _words(
    "dropout dropout1d dropout2d dropout3d alpha_dropout view reshape flatten unflatten squeeze unsqueeze transpose "
    "permute contiguous mean sum amax amin avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d"
)
VALUES = _words(
    "item tolist __bool__ __float__ __int__ __index__ __complex__ __array__ __contains__ numpy equal allclose "
    "is_nonzero nonzero argwhere unique unique_consecutive masked_select"
)
