"""The multilayer perceptron: an input layer, hidden layers and a readout.

Shapes:
    K trials, B examples, V outputs
    features: [B, inputs], images [B, channels, H, W], or with a leading trial axis K
    activations: [K, B, width]; outputs: [K, B, V]
    targets: classes [B] or values [B, V], or with a leading trial axis K
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import zoo
from scaletune.models.blocks import Multipliers
from scaletune.models.layers import Linear, mean_cross_entropy

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": F.tanh,
}


class MLP(nn.Module):
    """features -> outputs; with targets -> the mean loss of each trial, [K].

    The loss is the cross-entropy in nats, or the squared error.
    """

    def __init__(
        self, config: zoo.MLPConfig, outputs: int, multipliers: Multipliers, stack: int = 1
    ):
        super().__init__()
        width = config.width

        def linear(name: str, fan_in: int, fan_out: int) -> Linear:
            return Linear(stack, fan_in, fan_out, multipliers[f"{name}.weight"], config.biases)

        self.stack, self.activation = stack, ACTIVATIONS[config.activation]
        self.squared = config.loss == "mse"
        self.input = linear("input", config.inputs, width)
        self.layers = nn.ModuleList(
            linear(f"layers.{i}", width, width) for i in range(config.depth)
        )
        self.readout = linear("readout", width, outputs)

    def hidden(self, features: Tensor) -> list[Tensor]:
        """The activations of the input layer and of each hidden layer, [K, B, width] each."""
        rows = features.flatten(-3) if features.ndim > 3 else features  # images as rows
        activations = [self.activation(self.input(rows.expand(self.stack, -1, -1)))]
        for layer in self.layers:
            activations.append(self.activation(layer(activations[-1])))
        return activations

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        y = self.readout(self.hidden(features)[-1])
        if targets is None:
            return y
        if self.squared:
            return (y - targets.reshape(-1, *y.shape[1:])).square().mean((1, 2))
        return mean_cross_entropy(y, targets)
