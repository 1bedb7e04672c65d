"""Stacks of user modules: each trial equals the module alone; errors of vmap become user errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from scaletune.errors import UserError
from scaletune.training.vmap_stack import VmapStack

# vmap has no batching rule for attention on a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


class Net(nn.Module):
    """Attention over a sequence, a buffer and a loss, as a user may write them."""

    def __init__(self, seed, width=16):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.ModuleDict(
                {"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, 5)}
            )
            self.register_buffer("shift", torch.randn(width))

    def forward(self, x, targets):
        q, k, v = (part[:, None] for part in self.inner["qkv"](x + self.shift).chunk(3, -1))
        y = self.inner["out"](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return F.cross_entropy(y.flatten(0, 1), targets.flatten())


class Peeking(Net):
    def forward(self, x, targets):
        loss = super().forward(x, targets)
        return loss * 2 if loss.item() > 1 else loss


def batch():
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(4, 7, 16, generator=drawn), torch.randint(5, (4, 7), generator=drawn)


def test_a_stack_trains_each_module_as_it_would_alone():
    """AdamW steps on the stack against torch's own loop on each module."""
    nets, (x, targets) = [Net(seed) for seed in range(3)], batch()
    stack = VmapStack(nets)
    opt = torch.optim.AdamW(stack.parameters(), lr=1e-2)
    others = [torch.optim.AdamW(net.parameters(), lr=1e-2) for net in nets]
    for _ in range(20):
        losses = stack(x, targets)
        alone = [net(x, targets) for net in nets]
        assert torch.allclose(losses, torch.stack(alone), rtol=1e-5)
        losses.sum().backward()
        opt.step()
        opt.zero_grad()
        for loss, other in zip(alone, others, strict=True):
            loss.backward()
            other.step()
            other.zero_grad()
    assert losses.max() < 1.7  # the loss starts above ln 5 = 1.61
    for k, net in enumerate(nets):
        extracted = Net(99)
        extracted.load_state_dict(stack.trial(k))
        assert torch.allclose(extracted(x, targets), net(x, targets), rtol=1e-5)


def test_an_error_of_vmap_becomes_a_user_error():
    with pytest.raises(
        UserError,
        match=r"a Peeking cannot be stacked, because vmap does not support it \(.*\): "
        r"train its trials alone",
    ):
        VmapStack([Peeking(0), Peeking(1)])(*batch())


def test_tied_weights_stay_tied_and_frozen_ones_frozen():
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                self.table, self.scale, self.head = (
                    nn.Embedding(9, 4),
                    nn.Linear(4, 4),
                    nn.Linear(4, 9, bias=False),
                )
            self.head.weight = self.table.weight
            self.register_buffer("cache", torch.ones(4), persistent=False)
            self.scale.weight.requires_grad_(False)

        def forward(self, ids):
            return self.head(self.scale(self.table(ids)) * self.cache).square().mean()

    nets, ids = [Tied(seed) for seed in range(2)], torch.arange(6)
    stack = VmapStack(nets)
    stack(ids).sum().backward()
    for k, net in enumerate(nets):
        net(ids).backward()
        assert torch.allclose(stack.stacked["table/weight"].grad[k], net.table.weight.grad)
        assert stack.trial(k).keys() == net.state_dict().keys()
    assert stack.stacked["scale/weight"].grad is None
    assert stack.stacked["scale/bias"].grad is not None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)),
            "a ParametrizedLinear cannot be stacked, .*of the same class",
        ),
        (lambda: nn.ReLU(), "a ReLU cannot be stacked, .*at least one Tensor"),
        (lambda: Numpy(16, 4), "a Numpy cannot be stacked, .*doesn't have storage"),
    ],
)
def test_other_errors_of_torch_become_user_errors(make, message):
    with pytest.raises(UserError, match=message):
        VmapStack([make(), make()])(batch()[0])


class Numpy(nn.Linear):
    def forward(self, x):
        return torch.from_numpy(super().forward(x).detach().numpy())


def test_modules_that_differ_are_refused():
    with pytest.raises(
        UserError, match=r"the same shapes, but `inner.out.weight` is \(5, 16\) and \(5, 32\)"
    ):
        VmapStack([Net(0), Net(1, width=32)])
    with pytest.raises(UserError, match="of one class, but got Net, Peeking"):
        VmapStack([Net(0), Peeking(1)])
    with pytest.raises(UserError, match="of one class, but got no module"):
        VmapStack([])


def test_an_error_of_the_module_itself_stays_its_own():
    with pytest.raises(RuntimeError, match="size of tensor"):
        VmapStack([Net(0), Net(1)])(torch.zeros(4, 7, 3), batch()[1])
