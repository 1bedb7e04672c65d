"""A tiny recipe and corpus for every test; hypothesis draws the same examples on every machine."""

import os
import random
import signal
import sys

import pytest
from hypothesis import settings

# Bitwise tests need one thread, and several threads on a shared core are very slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A background job ignores SIGINT and its children inherit that; tests interrupt such children.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No test needs torchvision, and a build for another torch breaks the import of transformers.
sys.modules["torchvision"] = None

collect_ignore = ["fixtures"]  # make.py needs libraries that the tests do not need

settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

TINY = {
    "model": {"width": 32, "depth": 2, "head_dim": 16, "ffn_ratio": 2.0},
    "parametrization": {"base_width": 32, "init_std": 0.05},
    "optimizer": {"lr": 5e-3},
    "data": {"seq_len": 32},
    "budget": {"tokens": 8 * 256, "batch_tokens": 256, "eval_tokens": 512},
}


def pytest_collection_modifyitems(config, items):
    """Slow tests run where `-m` asks for them: `pytest -m slow`."""
    if "slow" not in config.option.markexpr:
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: run it with `pytest -m slow`"))


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A text file of 40 kB of made-up prose, the same on every run."""
    stream = random.Random("words")
    vocabulary = ["".join(stream.choices("abcdefghij", k=stream.randint(2, 7))) for _ in range(200)]
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text(" ".join(stream.choices(vocabulary, weights=range(1, 201), k=8000)))
    return path


@pytest.fixture(scope="session")
def tiny(words):
    """settings -> a Recipe of eight steps at width 32.

    Settings are `{short name or dotted path: value}`.
    """
    from scaletune.recipe import validate_recipe, with_settings

    recipe = validate_recipe(TINY | {"data": TINY["data"] | {"source": str(words)}}, "tiny")
    return lambda settings=(), **named: with_settings(recipe, dict(settings) | named)


VOCAB = 64
EVIDENCE = {  # as `prepare` creates it
    "scaletune": "0.1.0",
    "fit": "0123456789abcdef",
    "law": "lr_nd",
    "n_params": 25000,
    "tokens": 2048,
    "lr": 0.0123456,
    "interval": {"lr": [0.009, 0.017], "batch_tokens": None, "loss": None},
    "level": 0.95,
    "band": {"lr": [0.0061, 0.024]},
    "loss": None,
    "status": ['a sentence with "quotes", a \\ and an é'],
    "assumptions": ["one", "two"],
}
WIDE = {"width": 128, "parametrization.base_width": 32, "parametrization.init_std": 0.2}


@pytest.fixture(scope="session")
def transferred(tiny):
    """settings -> a Transfer, without a fit."""
    from scaletune import counting
    from scaletune.transferring import Transfer

    def make(settings=()):
        target = tiny(WIDE | dict(settings) | {"evidence": EVIDENCE})
        return Transfer(
            target,
            VOCAB,
            counting.plan_tensors(target, VOCAB),
            counting.multipliers(target, VOCAB),
            EVIDENCE,
        )

    return make
