"""One trial: deterministic to the bit, the same over two processes, and a divergence is a record."""

import json
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scaletune import counting, data, models, optim, training
from scaletune.errors import UserError
from scaletune.recipe import identity


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


def trained(recipe, acc):
    return training.trial(recipe, "main", acc)


def test_a_trial_learns_and_says_what_it_was(tiny, acc):
    recipe = tiny(tokens=30 * 256, lr=2e-2, width=64)
    trial, curve = trained(recipe, acc)
    corpus, counts = data.load(recipe.data), counting.params(recipe.model, 256)
    assert trial.status == "done" and trial.message == ""
    assert 0.9 < trial.loss < math.log(11) + 0.2  # nats: 5.1 a word of 5.5 letters, and eleven letters
    assert curve[0] == pytest.approx(math.log(256), rel=0.02) and len(curve) == 30
    assert trial.train_loss == pytest.approx(sum(curve[-3:]) / 3)
    assert (trial.id, trial.sweep) == (identity(recipe, corpus.digest), "main")
    assert (trial.width, trial.depth, trial.tokens, trial.batch_tokens, trial.seq_len, trial.lr, trial.seed) == (
        64,
        2,
        7680,
        256,
        32,
        2e-2,
        0,
    )
    assert (trial.n_params, trial.n_params_total) == (counts["n_params"], counts["n_params_total"])
    assert trial.flops == counting.flops_per_token(recipe.model, 256, 32) * 7680
    assert trial.point["data"]["digest"] == corpus.digest


AGAIN = """
import json, sys
from scaletune import recipe, training
trial, curve = training.trial(recipe.validated(json.loads(sys.argv[1]), "again"), "main", training.accelerator())
print(json.dumps([trial.id, trial.loss, curve]))
"""


def test_a_fresh_process_trains_the_same_bits(tiny, acc):
    recipe = tiny(width=64)
    here, curve = trained(recipe, acc)
    trained(tiny(seed=1), acc)
    assert trained(recipe, acc)[1] == curve  # another trial in between leaves no trace
    command = [sys.executable, "-W", "error", "-c", AGAIN, json.dumps(recipe.model_dump())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [here.id, here.loss, curve]


@pytest.mark.parametrize(
    "settings", [{"seed": 1}, {"lr": 6e-3}, {"optimizer.beta2": 0.9}, {"optimizer.clip": 1e-3}, {"schedule.warmup": 0.5}]
)
def test_what_identifies_a_trial_reaches_it(tiny, acc, settings):
    assert trained(tiny(settings), acc)[0].loss != trained(tiny(), acc)[0].loss


@pytest.mark.parametrize("lr", [1e3, 1e30])
def test_a_divergence_is_a_record(tiny, acc, lr):
    trial, curve = trained(tiny({"lr": lr, "schedule.kind": "constant"}), acc)
    assert (trial.status, trial.loss, trial.train_loss) == ("diverged", None, None)
    assert trial.message.startswith(f"loss {curve[-1]:.3g} at step {len(curve) - 1} of 8, above 2 ln(vocabulary) = 11.1")
    assert not curve[-1] <= 2 * math.log(256)
    json.dumps(vars(trial), allow_nan=False)


def test_a_divergence_of_the_last_step_is_one_too(tiny, acc):
    """One step is no training loss after it: the held-out loss is the first to see it."""
    settings = {"tokens": 256, "lr": 1e3, "schedule.kind": "constant", "schedule.warmup": 0.0}
    trial, curve = trained(tiny(settings), acc)
    assert (trial.status, trial.loss, len(curve)) == ("diverged", None, 1)
    assert trial.message.startswith("held-out loss ")


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, [0, 7]), (0.25, [0, 2, 7]), (1.0, [0, 7])])
def test_the_guard_looks_at_the_start_after_warmup_and_at_the_end(tiny, acc, monkeypatch, warmup, steps):
    """And changes nothing of the trial."""
    recipe, asked = tiny({"width": 64, "schedule.warmup": warmup, "schedule.decay": 0.0}), []
    expected = trained(recipe, acc)
    monkeypatch.setattr(optim, "guard", lambda opt, plan, when: asked.append(when))
    trial, curve = trained(recipe, acc)
    assert asked == [f"at step {step} of 8" for step in steps]
    assert (trial.id, trial.loss, curve) == (expected[0].id, expected[0].loss, expected[1])


@pytest.mark.parametrize(("from_share", "step"), [(0.0, 0), (0.1, 1), (0.9, 7)])
def test_a_schedule_that_writes_absolute_values_is_stopped(tiny, acc, monkeypatch, from_share, step):
    sound = optim.set_share

    def absolute(opt, schedule, share):
        sound(opt, schedule, share)
        for group in opt.param_groups if share > from_share else ():
            group["lr"] = 1e-3

    monkeypatch.setattr(optim, "set_share", absolute)
    with pytest.raises(UserError, match=rf"at step {step} of 8 the group of .* has 1 times the lr of .*, where the plan has 0.5"):
        trained(tiny(width=64), acc)


def test_progress_ends_at_one(tiny, acc):
    shares = []
    training.trial(tiny(), "main", acc, shares.append)
    assert shares == pytest.approx([step / 8 for step in range(1, 9)])


def test_nothing_of_a_trial_is_kept(tiny, acc, monkeypatch):
    """A worker trains hundreds; Accelerate keeps what it prepared."""
    built, build = [], models.build

    def watched(*arguments):
        model = build(*arguments)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "build", watched)
    trained(tiny(), acc)
    assert len(built) == 1 and built[0]() is None


class Fixed(torch.nn.Module):
    """A model whose loss is the mean of its targets."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tokens, targets):
        self.seen.append(targets)
        return targets.double().mean()[None]


@given(tokens=st.integers(32, 8000), a=st.integers(0, 3), b=st.integers(0, 3))
def test_held_out_loss_is_over_the_same_windows_for_every_trial(tiny, acc, tokens, a, b):
    seen = []
    for seed, width in ((a, 32), (b, 64)):
        recipe, model = tiny({"seed": seed, "width": width, "budget.eval_tokens": tokens}), Fixed()
        corpus = data.load(recipe.data)
        loss = training.evaluate(model, corpus, recipe, acc)
        seen.append(torch.cat(model.seen))
        assert loss == pytest.approx(float(seen[-1].double().mean()), rel=1e-12)  # parts of unequal size weigh as they should
    assert torch.equal(*seen) and seen[0].shape[1] == 32
    assert seen[0].numel() <= max(tokens, 32)


PAIR = """
import json, sys
from accelerate import debug_launcher
from scaletune import models, recipe, training

rows, forward = [], models.Transformer.forward
models.Transformer.forward = lambda model, tokens, targets: rows.append(len(tokens)) or forward(model, tokens, targets)

def work(content, out):
    trial, curve = training.trial(recipe.validated(content, "pair"), "main", acc := training.accelerator())
    if acc.is_main_process:
        open(out, "w").write(json.dumps([rows[:8], trial.id, trial.loss, curve]))

debug_launcher(work, (json.loads(sys.argv[1]), sys.argv[2]), num_processes=2)
"""


def test_two_processes_train_as_one(tiny, acc, tmp_path):
    recipe = tiny(width=64)
    alone, curve = trained(recipe, acc)
    command = [sys.executable, "-c", PAIR, json.dumps(recipe.model_dump()), str(tmp_path / "out.json")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    rows, trial_id, loss, theirs = json.loads(Path(tmp_path / "out.json").read_text())
    assert (rows, trial_id) == ([4] * 8, alone.id)  # each has half of the same eight rows
    assert theirs == pytest.approx(curve, rel=1e-5) and loss == pytest.approx(alone.loss, rel=1e-5)


def test_rows_that_do_not_divide_are_refused(tiny, acc):
    class Three:
        num_processes = 3

    recipe = tiny()
    with pytest.raises(UserError, match="`batch_tokens / seq_len % processes == 0` must hold, but got 8 rows on 3 processes"):
        training.train(recipe, data.load(recipe.data), Three())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_trains_as_the_cpu(tiny):
    code = AGAIN.replace("training.accelerator()", "__import__('accelerate').Accelerator(cpu=True)")
    recipe = tiny(width=64)
    done = subprocess.run([sys.executable, "-c", code, json.dumps(recipe.model_dump())], capture_output=True, text=True, check=True)
    trial, curve = trained(recipe, training.accelerator())
    cpu_id, loss, cpu_curve = json.loads(done.stdout)
    assert trial.provenance["device"] == torch.cuda.get_device_name() and trial.id == cpu_id
    assert curve == pytest.approx(cpu_curve, rel=1e-3) and trial.loss == pytest.approx(loss, rel=1e-3)
