"""oneDNN products: float32 accuracy, used only where faster, same bits in a stack."""

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
LARGE = {"width": 64, "budget.tokens": 5120, "budget.batch_tokens": 512}  # large enough for oneDNN


@pytest.fixture
def onednn_supported(monkeypatch):
    """Pretends that this processor is faster with oneDNN."""
    monkeypatch.setattr(onednn_matmul, "_supports_onednn", lambda: True)


@pytest.fixture
def needs_onednn():
    if not onednn_matmul._supports_onednn():
        pytest.skip("torch's own products are as good on this processor")


@pytest.mark.parametrize(
    ("a", "b"), [((512, 64), (64, 256)), ((8, 512, 32), (8, 32, 96)), ((64, 64, 16), (64, 16, 64))]
)
def test_products_have_float32_accuracy(needs_onednn, tiny, a, b):
    """Against float64; bfloat16 would err by 4e-3."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(a, generator=generator), torch.randn(b, generator=generator)
    true = x.double() @ y.double()
    with use_onednn(tiny(LARGE), CPU):
        assert ((x @ y) - true).abs().max() < 3e-6 * true.abs().max()


def test_a_product_in_bfloat16_is_detected():
    assert is_float32_product(torch.matmul)
    assert is_float32_product(lambda a, b: (a.double() @ b.double()).float())
    assert not is_float32_product(lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert not is_float32_product(lambda a, b: a.bfloat16().float() @ b)


def kernels(q):
    with profile() as seen:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return {event.key for event in seen.key_averages()}


def test_settings_are_as_before(onednn_supported, tiny):
    q = torch.zeros(2, 2, 64, 16)
    with pytest.raises(ZeroDivisionError), use_onednn(tiny(LARGE), CPU):
        assert torch.get_float32_matmul_precision() == "medium"
        assert not any("flash" in name for name in kernels(q))
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == "highest"
    assert any("flash" in name for name in kernels(q))


def test_it_applies_only_where_it_is_faster(onednn_supported, tiny):
    assert applies(tiny(LARGE), CPU)
    assert not applies(tiny(LARGE), torch.device("cuda"))
    assert not applies(tiny(LARGE | {"training.precision": "bf16"}), CPU)
    assert not applies(tiny(LARGE | {"data.seq_len": 2 * MAX_POSITIONS}), CPU)
    assert not applies(tiny(LARGE | {"engine.accumulation": 4}), CPU)
    rows = MIN_ROWS_TIMES_WIDTH // 64
    assert [
        applies(tiny(LARGE | {"budget.batch_tokens": size, "budget.tokens": 10 * size}), CPU)
        for size in (rows, rows // 2)
    ] == [True, False]


def test_a_users_own_precision_stays(onednn_supported, tiny):
    torch.set_float32_matmul_precision("high")
    try:
        with use_onednn(tiny(LARGE), CPU):
            assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("cpuinfo", ["vendor_id\t: GenuineIntel\n", None])
def test_other_processors_use_the_products_of_torch(monkeypatch, tmp_path, tiny, cpuinfo):
    info = tmp_path / "cpuinfo"
    if cpuinfo:
        info.write_text(cpuinfo)
    monkeypatch.setattr(onednn_matmul, "CPUINFO", info)
    onednn_matmul._supports_onednn.cache_clear()
    try:
        assert not applies(tiny(LARGE), CPU)
    finally:
        onednn_matmul._supports_onednn.cache_clear()


def test_a_trial_is_what_torchs_own_products_make_it(needs_onednn, tiny, monkeypatch):
    """200 steps well below the edge of stability."""
    point = tiny(LARGE | {"budget.tokens": 200 * 512, "lr": 5e-4})
    ours = training.run_trial(point, "main", training.accelerator())
    monkeypatch.setattr(onednn_matmul, "_supports_onednn", lambda: False)
    theirs = training.run_trial(point, "main", training.accelerator())
    assert ours[1] == pytest.approx(theirs[1], abs=1e-5)
    assert ours[0].loss == pytest.approx(theirs[0].loss, abs=1e-5)
    assert ours[1] != theirs[1]  # another library computed the sums


@pytest.mark.parametrize("settings", [{}, {"model.kv_heads": 1}, {"model.qk_norm": True}])
def test_a_stacked_trial_is_the_trial_alone(needs_onednn, tiny, settings):
    points = [tiny(LARGE | settings | {"lr": lr}) for lr in (1e-3, 4e-3, 1e3)]
    together = {
        trial.id: curve
        for trial, curve in training.train_stack(points, ["main"] * 3, training.accelerator())
    }
    for point in points:
        trial, curve = training.run_trial(point, "main", training.accelerator())
        # as text, because NaN != NaN
        assert list(map(str, together[trial.id])) == list(map(str, curve))
