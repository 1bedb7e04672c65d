"""The multilayer perceptron: an input layer, hidden layers, a readout."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import zoo
from scaletune.models.blocks import Multipliers
from scaletune.models.layers import Linear, mean_nats

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": F.tanh,
}


class MLP(nn.Module):
    """features [B, inputs] or images -> outputs [K, B, V]; with targets, classes [B] or values [B, V] -> mean nats, or squared error, of each trial.

    Features and targets may have a trial axis in front: each trial's own.
    """

    def __init__(self, model: zoo.MLP, outputs: int, multipliers: Multipliers, stack: int = 1):
        super().__init__()

        def linear(name: str, fan_in: int, fan_out: int) -> Linear:
            return Linear(stack, fan_in, fan_out, multipliers[f"{name}.weight"], model.biases)

        self.stack, self.activation, self.squared = (
            stack,
            ACTIVATIONS[model.activation],
            model.loss == "mse",
        )
        self.input = linear("input", model.inputs, model.width)
        self.layers = nn.ModuleList(
            linear(f"layers.{i}", model.width, model.width) for i in range(model.depth)
        )
        self.readout = linear("readout", model.width, outputs)

    def hidden(self, features: Tensor) -> list[Tensor]:
        """What the input layer and each hidden layer give, activated: [K, B, width] each."""
        rows = features.flatten(-3) if features.ndim > 3 else features  # images as rows
        found = [self.activation(self.input(rows.expand(self.stack, -1, -1)))]
        for layer in self.layers:
            found.append(self.activation(layer(found[-1])))
        return found

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Tensor:
        y = self.readout(self.hidden(features)[-1])
        if targets is None:
            return y
        return (
            (y - targets.reshape(-1, *y.shape[1:])).square().mean((1, 2))
            if self.squared
            else mean_nats(y, targets)
        )
