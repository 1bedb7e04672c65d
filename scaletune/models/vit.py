"""The Vision Transformer (arXiv:2010.11929). Shapes: K trials, B images, T patches and class token, V classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scaletune import zoo
from scaletune.models.blocks import Block, Multipliers, norm
from scaletune.models.layers import Conv, Embedding, Linear, mean_nats, product


class Projection(Conv):
    """The convolution whose stride is its side, as a product: images [B, channels, H, W] -> [K, B, patches, width].

    Its sums are a trial's own, bias included, however many there are: a convolution's gradients come in another order for each stack.
    """

    def forward(self, images: Tensor) -> Tensor:
        pixels = (
            F.unfold(images, self.stride, stride=self.stride).transpose(1, 2).flatten(0, 1)
        )  # [B * patches, channels * side**2]
        y = product(
            pixels.expand(len(self.weight), -1, -1),
            self.weight.flatten(2),
            self.multiplier,
            self.bias,
        )
        return y.unflatten(1, (len(images), -1))


class Patches(nn.Module):
    """images [B, channels, H, W] -> [K, B, patches, width]."""

    def __init__(self, stack: int, model: zoo.ViT, name: str, multipliers: Multipliers):
        super().__init__()
        multiplier = multipliers[f"{name}.projection.weight"]
        self.projection = Projection(
            stack,
            model.channels,
            model.width,
            model.patch,
            multiplier,
            stride=model.patch,
            bias=model.biases,
            shared=True,
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(images)


class Embeddings(nn.Module):
    """Patches behind a class token, and a learned position on each: [K, B * T, width]."""

    def __init__(self, stack: int, model: zoo.ViT, name: str, multipliers: Multipliers):
        super().__init__()
        self.multiplier, self.tokens = multipliers["embedding"], model.tokens
        self.patch_embeddings = Patches(stack, model, f"{name}.patch_embeddings", multipliers)
        self.cls_token = Embedding(stack, 1, model.width) if model.pool == "class" else None
        self.position_embeddings = Embedding(stack, model.tokens, model.width)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embeddings(images)
        if self.cls_token is not None:
            first = self.cls_token(
                torch.zeros(len(images), dtype=torch.long, device=images.device)
            )[:, :, None]
            x = torch.cat([first * self.multiplier, x], 2)
        positions = self.position_embeddings(torch.arange(self.tokens, device=images.device))
        return (x + positions[:, None] * self.multiplier).flatten(1, 2)


class Encoder(nn.Module):
    """Embeddings, blocks, final norm: the residual stream after each, [K, B * T, width]."""

    def __init__(self, stack: int, model: zoo.ViT, multipliers: Multipliers):
        super().__init__()
        self.tokens = model.tokens
        self.embeddings = Embeddings(stack, model, "vit.embeddings", multipliers)
        self.layers = nn.ModuleList(
            Block(stack, model, f"vit.layers.{i}", multipliers, causal=False)
            for i in range(model.depth)
        )
        self.layernorm = norm(stack, model, model.width)

    def forward(self, images: Tensor) -> list[Tensor]:
        stream = [self.embeddings(images)]
        for block in self.layers:
            stream.append(block(stream[-1], self.tokens))
        return [*stream, self.layernorm(stream[-1])]


class ViT(nn.Module):
    """images [B, channels, H, W] -> logits [K, B, V]; with classes [B] -> mean nats per image of each trial, [K]."""

    def __init__(self, model: zoo.ViT, classes: int, multipliers: Multipliers, stack: int = 1):
        super().__init__()
        self.by_class_token = model.pool == "class"
        self.vit = Encoder(stack, model, multipliers)
        self.classifier = Linear(
            stack, model.width, classes, multipliers["classifier.weight"], model.biases
        )

    @property
    def readout(self) -> Linear:
        """The last layer."""
        return self.classifier

    def hidden(self, images: Tensor) -> list[Tensor]:
        """The residual stream after the embeddings, after each block, and normed: [K, N, width] each."""
        return self.vit(images)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.hidden(images)[-1].unflatten(1, (len(images), -1))  # [K, B, T, width]
        logits = self.classifier(x[:, :, 0] if self.by_class_token else x.mean(2))
        return logits if targets is None else mean_nats(logits, targets)
