"""The CUDA graph of a stacked step, on a GPU and on a CPU.

On a CPU a fake recorder replays a step by running it recorder.
"""

import json
import subprocess
import sys

import pytest
import torch

from scaletune import data, training
from scaletune.optim import fused_stack
from scaletune.training import cuda_graph, loop
from scaletune.training.stacked_loop import Stack

OWN = [
    {"lr": 2e-3},
    {"lr": 4e-3, "seed": 1, "optimizer.clip": 0.05},
    {"lr": 1e-3, "schedule.kind": "cosine", "schedule.ema_half_life": 1024},
]
# diverges after some steps
DIVERGES = {
    "lr": 3.0,
    "schedule.kind": "linear",
    "schedule.warmup": 0.5,
}
STEPS = 24
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def acc():
    return training.accelerator()


def stack_points(tiny, *own, **settings):
    return [tiny({"tokens": STEPS * 256} | settings | each) for each in own]


def train_points(points, acc):
    """{lr: (status, held-out loss, curve)}."""
    return {
        trial.lr: (trial.status, trial.loss, curve)
        for trial, curve in training.train_stack(points, ["a"] * len(points), acc)
    }


class FakeRecorder:
    """Replaces the recorder of CUDA: a replay runs the step again with the recorded inputs."""

    def __init__(self):
        self.recordings, self.replays = 0, 0

    def __call__(self, work):
        self.recordings += 1
        result = []

        def replay():
            self.replays += 1
            result[:] = [work()]

        class Later:
            def clone(_):
                return result[0].clone()

        return replay, Later()


@pytest.fixture
def recorder(monkeypatch):
    fake = FakeRecorder()
    monkeypatch.setattr(fused_stack, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda_graph, "DEVICES", ("cpu",))
    monkeypatch.setattr(cuda_graph, "run_on_side_stream", lambda work: work())
    monkeypatch.setattr(cuda_graph, "record_graph", fake)
    return fake


@pytest.mark.parametrize("settings", [{}, {"engine.accumulation": 2}], ids=str)
def test_a_replayed_step_is_the_step(tiny, acc, monkeypatch, recorder, settings):
    """Same batches, learning rates and losses; recorded again after a trial leaves the stack."""
    points = stack_points(tiny, *OWN, DIVERGES, **settings)
    replayed = train_points(points, acc)
    assert recorder.recordings == 2 and replayed[3.0][0] == "diverged"
    steps_before_divergence = len(replayed[3.0][2])  # steps of the first stack
    replays_of_first = max(0, steps_before_divergence - cuda_graph.WARMUP_CALLS)
    replays_of_second = STEPS - steps_before_divergence - cuda_graph.WARMUP_CALLS
    assert recorder.replays == replays_of_first + replays_of_second
    monkeypatch.setattr(cuda_graph, "DEVICES", ())
    assert train_points(points, acc) == replayed


def test_steps_that_cannot_be_recorded_are_taken_one_kernel_at_a_time(
    tiny, acc, monkeypatch, recorder, capsys
):
    def refuse(work):
        """Runs the step without its update, then fails as a recording on a GPU does."""
        move, stacks[1].fused_step = stacks[1].fused_step, lambda: None
        work()
        stacks[1].fused_step = move
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    points = stack_points(tiny, *OWN[:2])
    stacks = [
        Stack([loop.start_run(point, data.load(point.data), acc) for point in points])
        for _ in range(2)
    ]
    for stack, record in zip(stacks, (recorder, refuse), strict=True):
        monkeypatch.setattr(cuda_graph, "record_graph", record)
        for _ in range(6):
            stack.update()
    message = capsys.readouterr().err
    assert message == (
        "stacked training without a CUDA graph: CUDA could not record the step "
        "(CUDA error: operation not permitted when stream is capturing)\n"
    )
    for one, other in zip(*(stack.runs for stack in stacks), strict=True):
        assert torch.equal(torch.stack(one.unread_losses), torch.stack(other.unread_losses))
    acc.free_memory()


def test_only_steps_that_read_nothing_back_are_recorded(tiny):
    moe = tiny(
        {
            "model": {
                "family": "moe",
                "width": 32,
                "depth": 1,
                "head_dim": 16,
                "n_experts": 4,
                "top_k": 2,
            }
        }
    )
    cuda = torch.device("cuda")
    assert cuda_graph.applies(tiny(), cuda)
    assert not cuda_graph.applies(moe, cuda)
    assert not cuda_graph.applies(tiny(), torch.device("cpu"))


# --- on a GPU -------------------------------------------------------------------------------------


def on_gpu(points, acc, monkeypatch, *, one_update, one_launch):
    monkeypatch.setattr(fused_stack, "DEVICES", ("cuda",) if one_update else ())
    monkeypatch.setattr(cuda_graph, "DEVICES", ("cuda",) if one_launch else ())
    return train_points(points, acc)


def assert_like(one, other, rel):
    for lr in (own["lr"] for own in OWN):
        assert one[lr][0] == other[lr][0] == "done"
        assert one[lr][2] == pytest.approx(other[lr][2], rel=rel)
        assert one[lr][1] == pytest.approx(other[lr][1], rel=rel)


@pytest.mark.gpu
@no_gpu
@pytest.mark.filterwarnings("default")  # warnings of the compiler
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "engine.accumulation": 2,
            "model.positions": "learned",
            "model.norm": "layer",
            "model.biases": True,
        },
        {"engine.compile": True},
        {"training.precision": "bf16"},
        {"optimizer.family": "muon"},
    ],
    ids=str,
)
def test_one_launch_trains_as_many(tiny, acc, monkeypatch, capsys, settings):
    """Graph and fused update, fused update only, and neither; one trial diverges and leaves."""
    points = stack_points(tiny, *OWN, DIVERGES, **settings)
    launched = on_gpu(points, acc, monkeypatch, one_update=True, one_launch=True)
    assert "refused to record" not in capsys.readouterr().err and launched[3.0][0] == "diverged"
    # These have products in bfloat16.
    rel = 1e-2 if settings.keys() & {"training.precision", "optimizer.family"} else 1e-5
    assert_like(launched, on_gpu(points, acc, monkeypatch, one_update=True, one_launch=False), rel)
    assert_like(launched, on_gpu(points, acc, monkeypatch, one_update=False, one_launch=False), rel)


READS_BACK = """
import torch
from scaletune.training.cuda_graph import GraphedStep
x = torch.arange(3.0, device="cuda")
step, work = GraphedStep(), lambda parts: parts[0][0] * float(parts[0][1].sum())
print([step(work, [(x, x + i)]).tolist() for i in range(6)])
"""


@pytest.mark.gpu
@no_gpu
def test_a_step_that_reads_back_is_not_recorded_and_runs_without_a_graph():
    """In a separate process, because a failed recording may leave CUDA in a bad state."""
    done = subprocess.run(
        [sys.executable, "-c", READS_BACK], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [[0.0, 3.0 + 3 * i, 6.0 + 6 * i] for i in range(6)]
    assert "could not record the step" in done.stderr


@pytest.mark.gpu
@no_gpu
def test_a_gpu_stack_goes_on_from_its_checkpoints(tiny, acc, tmp_path):
    settings = {"engine.checkpoint_every": 8, "engine.runs": str(tmp_path)}
    points = stack_points(tiny, *OWN, **settings)

    def stop(share):
        if share > 0.6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(training.train_stack(points, ["a"] * 3, acc, stop))
    resumed = train_points(points, acc)
    assert_like(resumed, train_points(stack_points(tiny, *OWN), acc), 1e-5)
