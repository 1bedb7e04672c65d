"""oneDNN products: float32 accuracy, used only where faster, same bits in any stack, settings restored."""

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import profile

from scaletune import training
from scaletune.training import onednn_matmul
from scaletune.training.onednn_matmul import (
    MAX_POSITIONS,
    MIN_ROWS_TIMES_WIDTH,
    applies,
    is_float32_product,
    use_onednn,
)

CPU = torch.device("cpu")
LARGE = {"width": 64, "budget.tokens": 5120, "budget.batch_tokens": 512}  # more than PAYS


@pytest.fixture
def able(monkeypatch):
    """As if this processor were faster with oneDNN."""
    monkeypatch.setattr(onednn_matmul, "_supports_onednn", lambda: True)


@pytest.fixture
def here():
    if not onednn_matmul._supports_onednn():
        pytest.skip("torch's own products are as good on this processor")


@pytest.mark.parametrize(
    ("a", "b"), [((512, 64), (64, 256)), ((8, 512, 32), (8, 32, 96)), ((64, 64, 16), (64, 16, 64))]
)
def test_products_are_float32s(here, tiny, a, b):
    """Against float64; bfloat16 would err by 4e-3."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(a, generator=generator), torch.randn(b, generator=generator)
    true = x.double() @ y.double()
    with use_onednn(tiny(LARGE), CPU):
        assert ((x @ y) - true).abs().max() < 3e-6 * true.abs().max()


def test_a_product_by_way_of_bfloat16_is_noticed():
    assert is_float32_product(torch.matmul)
    assert is_float32_product(lambda a, b: (a.double() @ b.double()).float())
    assert not is_float32_product(lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert not is_float32_product(lambda a, b: a.bfloat16().float() @ b)


def kernels(q):
    with profile() as seen:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return {event.key for event in seen.key_averages()}


def test_settings_are_as_before(able, tiny):
    q = torch.zeros(2, 2, 64, 16)
    with pytest.raises(ZeroDivisionError), use_onednn(tiny(LARGE), CPU):
        assert torch.get_float32_matmul_precision() == "medium"
        assert not any("flash" in name for name in kernels(q))
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
    assert any("flash" in name for name in kernels(q))


def test_only_where_it_pays(able, tiny):
    assert applies(tiny(LARGE), CPU)
    assert not applies(tiny(LARGE), torch.device("cuda"))
    assert not applies(tiny(LARGE | {"training.precision": "bf16"}), CPU)
    assert not applies(tiny(LARGE | {"data.seq_len": 2 * MAX_POSITIONS}), CPU)
    assert not applies(tiny(LARGE | {"engine.accumulation": 4}), CPU)
    rows = MIN_ROWS_TIMES_WIDTH // 64
    assert [
        applies(tiny(LARGE | {"budget.batch_tokens": size, "budget.tokens": 10 * size}), CPU)
        for size in (rows, rows // 2)
    ] == [
        True,
        False,
    ]


def test_a_users_own_precision_stays(able, tiny):
    torch.set_float32_matmul_precision("high")
    try:
        with use_onednn(tiny(LARGE), CPU):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("said", ["vendor_id\t: GenuineIntel\n", None])
def test_other_processors_multiply_as_torch_comes(monkeypatch, tmp_path, tiny, said):
    info = tmp_path / "cpuinfo"
    if said:
        info.write_text(said)
    monkeypatch.setattr(onednn_matmul, "CPUINFO", info)
    onednn_matmul._supports_onednn.cache_clear()
    try:
        assert not applies(tiny(LARGE), CPU)
    finally:
        onednn_matmul._supports_onednn.cache_clear()


def test_a_trial_is_what_torchs_own_products_make_it(here, tiny, monkeypatch):
    """200 steps well below the edge of stability."""
    point = tiny(LARGE | {"budget.tokens": 200 * 512, "lr": 5e-4})
    ours = training.run_trial(point, "main", training.accelerator())
    monkeypatch.setattr(onednn_matmul, "_supports_onednn", lambda: False)
    theirs = training.run_trial(point, "main", training.accelerator())
    assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
    assert ours[0].loss == pytest.approx(theirs[0].loss, abs=1e-5)
    assert ours[1] != theirs[1]  # another library computed the sums


@pytest.mark.parametrize("settings", [{}, {"model.kv_heads": 1}, {"model.qk_norm": True}])
def test_a_stacked_trial_is_the_trial_alone(here, tiny, settings):
    points = [tiny(LARGE | settings | {"lr": lr}) for lr in (1e-3, 4e-3, 1e3)]
    together = {
        trial.id: curve
        for trial, curve in training.train_stack(points, ["main"] * 3, training.accelerator())
    }
    for point in points:
        trial, curve = training.run_trial(point, "main", training.accelerator())
        assert list(map(str, together[trial.id])) == list(map(str, curve))  # a NaN is one
