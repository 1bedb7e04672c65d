"""The Vision Transformer (arXiv:2010.11929).

Shapes:
    K trials, B images of height H and width W, T = patches (+ 1 class token), V classes
    images: [B, channels, H, W]; residual stream x: [K, B * T, width]; logits: [K, B, V]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import zoo
from scaletune.models.blocks import Multipliers, TransformerBlock, norm
from scaletune.models.layers import Conv, Embedding, Linear, mean_cross_entropy, product


class Projection(Conv):
    """A convolution whose stride is its side, computed as a matrix product.

    images -> [K, B, patches, width]. The order of its sums, and so their rounding, does not depend
    on the stack size; that of a convolution's gradients does.
    """

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, self.stride, stride=self.stride)
        pixels = patches.transpose(1, 2).flatten(0, 1)  # [B * patches, channels * side**2]
        x, weight = pixels.expand(len(self.weight), -1, -1), self.weight.flatten(2)
        return product(x, weight, self.multiplier, self.bias).unflatten(1, (len(images), -1))


class Patches(nn.Module):
    """images -> [K, B, patches, width]."""

    def __init__(self, stack: int, config: zoo.ViTConfig, name: str, multipliers: Multipliers):
        super().__init__()
        self.projection = Projection(
            stack,
            config.channels,
            config.width,
            config.patch,
            multipliers[f"{name}.projection.weight"],
            stride=config.patch,
            bias=config.biases,
            shared=True,
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images)


class Embeddings(nn.Module):
    """images -> class token and patches, plus learned positions: [K, B * T, width]."""

    def __init__(self, stack: int, config: zoo.ViTConfig, name: str, multipliers: Multipliers):
        super().__init__()
        self.multiplier, self.tokens = multipliers["embedding"], config.tokens
        self.patch_embeddings = Patches(stack, config, f"{name}.patch_embeddings", multipliers)
        self.cls_token = Embedding(stack, 1, config.width) if config.pool == "class" else None
        self.position_embeddings = Embedding(stack, config.tokens, config.width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embeddings(images)
        if self.cls_token is not None:
            zeros = torch.zeros(len(images), dtype=torch.long, device=images.device)
            class_token = self.cls_token(zeros)[:, :, None]  # [K, B, 1, width]
            x = torch.cat([class_token * self.multiplier, x], 2)
        positions = self.position_embeddings(torch.arange(self.tokens, device=images.device))
        return (x + positions[:, None] * self.multiplier).flatten(1, 2)


class VisionEncoder(nn.Module):
    """Embeddings, blocks and final norm. Its output is the residual stream after each of them."""

    def __init__(self, stack: int, config: zoo.ViTConfig, multipliers: Multipliers):
        super().__init__()
        self.tokens = config.tokens
        self.embeddings = Embeddings(stack, config, "vit.embeddings", multipliers)
        self.layers = nn.ModuleList(
            TransformerBlock(stack, config, f"vit.layers.{i}", multipliers, causal=False)
            for i in range(config.depth)
        )
        self.layernorm = norm(stack, config, config.width)

    def forward(self, images: Tensor) -> list[Tensor]:
        stream = [self.embeddings(images)]
        for block in self.layers:
            stream.append(block(stream[-1], self.tokens))
        return [*stream, self.layernorm(stream[-1])]


class ViT(nn.Module):
    """images -> logits; with classes [B] -> the mean loss of each trial in nats per image, [K]."""

    def __init__(
        self, config: zoo.ViTConfig, classes: int, multipliers: Multipliers, stack: int = 1
    ):
        super().__init__()
        self.by_class_token = config.pool == "class"
        self.vit = VisionEncoder(stack, config, multipliers)
        self.classifier = Linear(
            stack, config.width, classes, multipliers["classifier.weight"], config.biases
        )

    @property
    def readout(self) -> Linear:
        """The last layer."""
        return self.classifier

    def hidden(self, images: Tensor) -> list[Tensor]:
        """The residual stream after the embeddings, each block and the final norm."""
        return self.vit(images)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.hidden(images)[-1].unflatten(1, (len(images), -1))  # [K, B, T, width]
        logits = self.classifier(x[:, :, 0] if self.by_class_token else x.mean(2))
        return logits if targets is None else mean_cross_entropy(logits, targets)
