"""Images and features, compared with synthetic records, scikit-learn and published exponents."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletune import data
from scaletune.data import synthetic, vision
from scaletune.errors import UserError
from scaletune.recipe import Data, PowerLaw, validate_recipe


def write(path, n, labels, classes, seed=0):
    """CIFAR records of synthetic images with different channels: (images, labels)."""
    stream = np.random.default_rng(seed)
    marks = stream.integers(0, classes, (n, labels)).astype(np.uint8)
    images = (stream.integers(0, 100, (n, 3, 1024)) + np.array([0, 50, 150])[:, None]).astype(
        np.uint8
    )
    path.write_bytes(
        b"".join(
            mark.tobytes() + image.tobytes() for mark, image in zip(marks, images, strict=True)
        )
    )
    return images.reshape(n, 3, 32, 32), marks


def normalised(images, train):
    mean, std = (
        train.mean((0, 2, 3), keepdims=True, dtype=float),
        train.std((0, 2, 3), keepdims=True, dtype=float),
    )
    return (images - mean) / std


def cifar(path, form="cifar10", **settings):
    return data.load(Data(source=str(path), format=form, seq_len=1, **settings))


def test_cifars_folder_is_read_as_it_is_written(tmp_path):
    parts = [write(tmp_path / f"data_batch_{i}.bin", 7 + i, 1, 10, i) for i in range(3)]
    images, marks = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    tested, test_marks = write(tmp_path / "test_batch.bin", 5, 1, 10, 9)
    corpus = cifar(tmp_path)
    inputs, targets = corpus.train.take(np.arange(24)[::-1])
    assert np.array_equal(inputs, images[::-1]) and np.array_equal(targets, marks[::-1, 0])
    held, labels = corpus.held_out_batch(5, 1)
    np.testing.assert_allclose(held, normalised(tested, images), atol=1e-5)
    assert labels.tolist() == test_marks[:, 0].tolist()
    assert (corpus.vocab_size, corpus.features) == (10, (3, 32, 32))
    assert isinstance(corpus.train.parts[0][0], np.memmap)


@pytest.mark.parametrize(("form", "column"), [("cifar100", 1), ("cifar100-coarse", 0)])
def test_cifar100_has_two_labels(tmp_path, form, column):
    _, marks = write(tmp_path / "train.bin", 20, 2, 20)
    corpus = cifar(tmp_path / "train.bin", form, held_out=0.25)
    assert corpus.vocab_size == {"cifar100": 100, "cifar100-coarse": 20}[form]
    assert corpus.train.take(np.arange(15))[1].tolist() == marks[:15, column].tolist()
    assert corpus.held_out.take(np.arange(5))[1].tolist() == marks[15:, column].tolist()


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 9))
def test_a_shuffled_epoch_of_images_has_each_once(tmp_path_factory, seed, rows):
    path = tmp_path_factory.mktemp("cifar") / "data.bin"
    images, _ = write(path, 20, 1, 10)
    corpus = cifar(path, held_out=0.1, order="shuffle")
    seen = np.concatenate([corpus.batch(seed, step, rows, 1)[0] for step in range(-(-18 // rows))])[
        :18
    ]
    expected = normalised(images[:18], images[:18])
    assert np.allclose(
        np.sort(seen.reshape(18, -1).sum(1)), np.sort(expected.reshape(18, -1).sum(1)), atol=1e-2
    )
    assert seen.dtype == np.float32 and corpus.batch(seed, 0, rows, 1)[1].dtype == np.int64


def test_bad_records_are_one_sentence(tmp_path):
    (tmp_path / "odd.bin").write_bytes(b"x" * 3074)
    with pytest.raises(
        UserError,
        match=r"^`data.source` must hold records of 1 \+ 3072 bytes, "
        r"but `.*odd.bin` has 3074 bytes$",
    ):
        cifar(tmp_path / "odd.bin")
    write(tmp_path / "many.bin", 40, 2, 100)
    with pytest.raises(UserError, match=r"^labels must be below 20, but `.*many.bin` holds \d+$"):
        cifar(tmp_path / "many.bin", "cifar100-coarse")
    with pytest.raises(
        UserError,
        match=r"^`data.source` must be a .bin file or a folder of them for `data.format` cifar10",
    ):
        (tmp_path / "none").mkdir()
        cifar(tmp_path / "none")
    write(tmp_path / "few.bin", 3, 1, 10)
    with pytest.raises(
        UserError,
        match=r"^`data.held_out` must leave examples in both splits, "
        r"but 0.99 leaves no train examples$",
    ):
        cifar(tmp_path / "few.bin", held_out=0.99)
    assert len(cifar(tmp_path / "few.bin", held_out=0.4).held_out) == 2
    with pytest.raises(
        UserError,
        match=r"`data.vocab_size` pads a vocabulary of tokens, "
        r"but '.*few.bin' holds images of 3 x 32 x 32",
    ):
        cifar(tmp_path / "few.bin", held_out=0.4, vocab_size=16)


@pytest.mark.parametrize(
    "section", [{"source": "digits"}, {"source": "power-law"}, {"source": "x", "format": "cifar10"}]
)
def test_an_example_counts_as_one_token(section):
    point = {
        "model": {"width": 32},
        "parametrization": {"base_width": 32},
        "budget": {"tokens": 64, "batch_tokens": 64},
    }
    with pytest.raises(
        UserError,
        match=r"^`seq_len == 1` must hold where an example counts as one token, "
        r"but got seq_len=64$",
    ):
        validate_recipe(point | {"data": section}, "examples")


def test_digits_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.datasets")
    images, targets = sklearn.load_digits(return_X_y=True)
    corpus = data.load(Data(source="digits", seq_len=1, held_out=0.2))
    pixels, labels = corpus.train.take(np.arange(len(corpus.train)))
    assert np.array_equal(pixels.reshape(-1, 64), images[:1437])
    assert np.array_equal(labels, targets[:1437])
    batch, _ = corpus.batch(0, 0, 20000, 1)
    assert batch.shape == (20000, 1, 8, 8)
    assert abs(batch.mean()) < 0.01
    assert abs(batch.std() - 1) < 0.01
    assert corpus.vocab_size == 10 and corpus.lengths() == {"train": 1437, "held-out": 360}


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        UserError, match=r"needs the package scikit-learn: pip install 'scaletune\[vision\]'$"
    ):
        data.load(Data(source="digits", seq_len=1, held_out=0.3))


def test_a_channel_that_never_changes_is_only_centred():
    flat = vision._images(
        *vision.Table(((np.full((10, 1, 2, 2), 7, np.uint8), np.zeros(10, np.int64)),)).split_tails(
            0.2
        ),
        2,
    )
    assert (flat.batch(0, 0, 4, 1)[0] == 0).all()


# --- the synthetic task ---------------------------------------------------------------------------

LAW = PowerLaw(inputs=400, examples=20000, spectrum=1.4, task=1.8)


@pytest.fixture(scope="module")
def task():
    return data.load(Data(source="power-law", seq_len=1, held_out=0.1, power_law=LAW))


def test_features_and_target_have_the_requested_spectra(task):
    inputs, targets = task.train.take(np.arange(18000))
    np.testing.assert_allclose(
        inputs.astype(float).var(0), np.arange(1, 401) ** -1.4, rtol=6 * np.sqrt(2 / 18000)
    )
    parts = (inputs * inputs * synthetic.teacher(LAW) ** 2).mean(0)
    np.testing.assert_allclose(parts / parts[0], np.arange(1, 401) ** -1.8, rtol=0.1)
    assert abs(targets.var() - 1) < 0.05
    correlation = np.corrcoef(inputs[:, :20].T)
    assert abs(correlation - np.eye(20)).max() < 5 / np.sqrt(18000)
    batch = task.batch(3, 5, 16, 1)
    assert batch[0].shape == (16, 400)
    assert batch[1].shape == (16, 1)
    assert batch[0].dtype == batch[1].dtype == np.float32
    assert task.vocab_size == 1 and task.features == (400,)


def slope(x, y):
    return -np.polyfit(np.log(x), np.log(y), 1)[0]


def test_the_loss_falls_with_width_as_published():
    """Least squares on the population through N random projections.

    The exponent is min(a - 1, 2 b) of arXiv:2402.01092.
    """
    law = PowerLaw(inputs=4000, spectrum=1.4, task=1.8)
    scaled, w = np.sqrt(synthetic.eigenvalues(law)), synthetic.teacher(law)
    widths, losses = np.array([16, 32, 64, 128]), []
    for width in widths:
        stream = np.random.default_rng(int(width))
        residuals = []
        for _ in range(4):
            # The projections in whitened coordinates.
            seen = scaled[:, None] * stream.standard_normal((law.inputs, width))
            target = scaled * w
            residual = target - seen @ np.linalg.lstsq(seen, target, rcond=None)[0]
            residuals.append(residual @ residual)
        losses.append(np.mean(residuals))
    assert slope(widths, losses) == pytest.approx(synthetic.exponents(law)["width"], abs=0.1)


def test_the_loss_falls_with_examples_as_published():
    """Minimum-norm interpolation of P examples has the same exponent in P on the population."""
    law = PowerLaw(inputs=3000, examples=1200, spectrum=1.4, task=1.8)
    corpus = data.load(Data(source="power-law", seq_len=1, held_out=0.1, power_law=law))
    w, eigenvalues = synthetic.teacher(law), synthetic.eigenvalues(law)
    counts, losses = np.array([16, 32, 64, 128]), []
    for count in counts:
        residuals = []
        for seed in range(4):
            inputs, targets = (part.astype(float) for part in corpus.batch(seed, 0, int(count), 1))
            weights = np.linalg.lstsq(inputs, targets[:, 0], rcond=1e-10)[0]
            residuals.append(((weights - w) ** 2 * eigenvalues).sum())
        losses.append(np.mean(residuals))
    assert slope(counts, losses) == pytest.approx(synthetic.exponents(law)["examples"], abs=0.15)


def test_the_loss_falls_with_time_as_published():
    """Gradient flow shrinks each term as exp(-2 lambda t): the exponent is (a - 1) / b."""
    law = PowerLaw(inputs=10**6, spectrum=1.4, task=1.8)
    eigenvalues = synthetic.eigenvalues(law)
    parts = eigenvalues * synthetic.teacher(law) ** 2
    times = np.geomspace(100, 10000, 5)
    losses = [(parts * np.exp(-2 * eigenvalues * t)).sum() for t in times]
    assert slope(times, losses) == pytest.approx(synthetic.exponents(law)["time"], abs=0.02)


def test_the_task_is_a_pure_function_of_its_settings():
    def digest(**settings):
        return data.load(
            Data(
                source="power-law",
                seq_len=1,
                power_law=PowerLaw(inputs=8, examples=100, **settings),
            )
        ).digest

    assert digest() == digest()
    assert (
        len({digest(), digest(seed=1), digest(noise=0.1), digest(task=2.0), digest(spectrum=2.0)})
        == 5
    )


# --- examples that a model accepts ----------------------------------------------------------------

IMAGES = "images of 3 x 32 x 32 (channels, height, width)"
MODELS = [
    ((), {"family": "transformer"}, None),
    (
        (),
        {"family": "vit", "image_size": 32, "channels": 3},
        "tokens, but got family='vit', image_size=32, channels=3",
    ),
    ((), {"family": "mlp", "inputs": 64}, "tokens, but got family='mlp', inputs=64"),
    ((3, 32, 32), {"family": "resnet", "image_size": 32, "channels": 3}, None),
    (
        (3, 32, 32),
        {"family": "resnet", "image_size": 28, "channels": 1},
        f"{IMAGES}, but got family='resnet', image_size=28, channels=1",
    ),
    ((3, 32, 32), {"family": "transformer"}, f"{IMAGES}, but got family='transformer'"),
    ((1, 8, 8), {"family": "mlp", "inputs": 64}, None),
    ((128,), {"family": "mlp", "inputs": 128}, None),
    ((128,), {"family": "mlp", "inputs": 64}, "128 features, but got family='mlp', inputs=64"),
    (
        (128,),
        {"family": "vit", "image_size": 32, "channels": 3},
        "128 features, but got family='vit', image_size=32, channels=3",
    ),
]


@pytest.mark.parametrize(("features", "section", "sentence"), MODELS)
def test_a_model_must_read_what_the_data_hold(features, section, sentence):
    corpus, model = SimpleNamespace(features=features, regression=False), SimpleNamespace(**section)
    if sentence is None:
        data.check_model(corpus, model)
        return
    with pytest.raises(UserError) as error:
        data.check_model(corpus, model)
    assert str(error.value) == f"the model must accept the examples of the data, {sentence}"


@pytest.mark.parametrize(
    ("source", "loss", "sentence"),
    [
        ("power-law", "cross_entropy", "'mse' where the targets are values"),
        ("digits", "mse", "'cross_entropy' where the targets are classes"),
    ],
)
def test_a_loss_must_suit_the_targets(source, loss, sentence):
    if source == "digits":
        pytest.importorskip("sklearn")
    corpus = data.load(Data(source=source, seq_len=1, power_law=PowerLaw(inputs=64, examples=100)))
    with pytest.raises(UserError, match=f"^`model.loss` must be {sentence}, but got '{loss}'$"):
        data.check_model(corpus, SimpleNamespace(family="mlp", inputs=64, loss=loss))
    other = {"mse": "cross_entropy", "cross_entropy": "mse"}[loss]
    data.check_model(corpus, SimpleNamespace(family="mlp", inputs=64, loss=other))
