"""The table of architectures; a new one is a function with ``@register_model("name")`` in a file of its own."""

from collections.abc import Callable

from torch import nn

# builder(num_classes, *, in_channels, image_size, width_multiplier) -> nn.Module; with a choice of norms also `norm`
ModelBuilder = Callable[..., nn.Module]
MODELS: dict[str, ModelBuilder] = {}


def register_model(name: str) -> Callable[[ModelBuilder], ModelBuilder]:
    """Decorator that makes a builder available as `name` in `build_model` and on the command line."""

    def register(builder: ModelBuilder) -> ModelBuilder:
        if name in MODELS:
            raise ValueError(f"model {name!r} is registered twice")
        MODELS[name] = builder
        return builder

    return register
