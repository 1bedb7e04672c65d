"""The environment changes no loss: what a trial computes comes from its recipe alone."""

import json
import subprocess
import sys

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import scaletune as st
from scaletune import environment, sweeping, training
from scaletune.errors import UserError
from scaletune.sweeping.engines import local
from scaletune.transferring.formats.recipe import toml

VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_DEBUG_MODE": "true",
    "FSDP_VERSION": "2",
}


@pytest.fixture
def no_accelerator():
    """Forgets the Accelerator of this process, as in a process that has none yet."""

    def forget():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    forget()
    yield forget
    forget()


@pytest.fixture(scope="module")
def plain(tiny):
    return training.run_trial(tiny(), "main", training.accelerator())


@pytest.mark.parametrize("name", [*VARIABLES, "all"])
def test_no_variable_of_accelerate_changes_a_loss(tiny, plain, no_accelerator, monkeypatch, name):
    variables = VARIABLES if name == "all" else {name: VARIABLES[name]}
    for each, value in variables.items():
        monkeypatch.setenv(each, value)
    trial, curve = training.run_trial(tiny(), "main", training.accelerator())
    assert (trial.id, trial.loss, curve) == (plain[0].id, plain[0].loss, plain[1])


def test_the_variables_would_change_losses_if_accelerate_saw_them(tiny, plain, no_accelerator):
    """An Accelerator of bf16, as ACCELERATE_MIXED_PRECISION makes it, trains other losses."""
    acc = Accelerator(cpu=True, mixed_precision="bf16")
    with pytest.raises(UserError, match=r"mixed_precision 'no'.* but got 'bf16'"):
        training.run_trial(tiny(), "main", acc)
    with pytest.raises(UserError, match="process without another Accelerator"):
        training.accelerator()


@pytest.mark.parametrize(
    "settings", [{"dynamo_backend": "eager"}, {"dynamo_backend": "inductor"}], ids=str
)
def test_an_accelerator_that_compiles_is_refused(tiny, no_accelerator, settings):
    with pytest.raises(UserError, match="an Accelerator of dynamo_backend 'no'"):
        training.run_trial(tiny(), "main", Accelerator(cpu=True, **settings))


def test_workers_and_their_processes_see_none_of_the_variables(tiny, tmp_path, plain, monkeypatch):
    precision = dict.fromkeys(environment.PRECISION_VARIABLES, "1")
    variables = (
        VARIABLES | precision | {"WORLD_SIZE": "1", "RANK": "0", "OMPI_COMM_WORLD_SIZE": "3"}
    )
    for each, value in variables.items():
        monkeypatch.setenv(each, value)
    assert not variables.keys() & local.worker_environment(0).keys()
    settings = {"engine.workers": 1, "engine.stack": 1}
    table = sweeping.sweep(tiny(settings), out=tmp_path / "one")
    assert table["loss"].tolist() == [plain[0].loss]
    with training.RankGroup() as group:
        trial, curve = group.run_trial(tiny({"engine.processes": 2}), "main")
    # bfloat16 would differ by 1e-4.
    assert curve == pytest.approx(plain[1], rel=1e-6) and trial.id == plain[0].id


def test_check_and_the_range_test_do_not_see_them(tiny, no_accelerator, monkeypatch):
    def measure():
        no_accelerator()
        return (
            training.lr_range_test(tiny(), 1e-4, 1.0, 10)["records"],
            st.check(tiny(), (32, 64), (0,))["sizes"],
        )

    expected = measure()
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert measure() == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NVIDIA_TF32_OVERRIDE", "0"),  # turns the TF32 of convolutions off
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
        ("DNNL_DEFAULT_FPMATH_MODE", "any"),
    ],
)
def test_a_variable_that_lowers_the_precision_of_this_process_is_refused(
    tiny, monkeypatch, name, value
):
    monkeypatch.setenv(name, value)
    message = f"^`{name}` must not be set where a trial trains, .* but got '{value}': unset it"
    with pytest.raises(UserError, match=message):
        training.accelerator()
    with pytest.raises(UserError, match=message):
        st.check(tiny(), (32, 64), (0,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "0"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "strict"),
        ("NVIDIA_TF32_OVERRIDE", ""),
    ],
)
def test_a_variable_that_keeps_the_precision_is_accepted(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    environment.require_full_precision()


def test_hidden_variables_come_back_and_new_ones_go(monkeypatch):
    variables = {"ACCELERATE_A": "1", "FSDP_B": "2", "KEPT": "3"}
    before = dict(variables)
    with environment.hidden(environment.ACCELERATE_VARIABLES, variables):
        assert variables == {"KEPT": "3"}
        variables["ACCELERATE_USE_FSDP"] = "true"
    assert variables == before


def test_one_process_of_a_launch_runs_the_command(capsys):
    launch = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "1", "HOME": "/"}
    for rank in ("1", "2", "3"):
        assert environment.leave_launch(launch | {"RANK": rank})
    first = launch | {"RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    assert not capsys.readouterr().err
    assert not environment.leave_launch(first) and first == {"HOME": "/"}
    assert "a launcher started 4 processes; the first runs" in capsys.readouterr().err
    assert not environment.leave_launch({"HOME": "/"}) and not capsys.readouterr().err
    with pytest.raises(UserError, match="on one machine, but it started 8 processes of which 4"):
        environment.leave_launch(launch | {"WORLD_SIZE": "8", "RANK": "5"})


def test_a_script_in_several_processes_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="started in one process, but WORLD_SIZE is 2: start the"):
        sweeping.sweep(tiny(), out=tmp_path)


def test_torchrun_launches_one_sweep(tiny, tmp_path):
    recipe = tiny({"axes": {"lr": [1e-3, 2e-3]}})
    content = recipe.model_dump(exclude={"holdout", "target", "compare", "fit"}, exclude_none=True)
    (tmp_path / "launched.toml").write_text(toml(content))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("-m", "scaletune", "sweep", str(tmp_path / "launched.toml"), "--out", str(tmp_path)),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_trials"] == 2
    assert done.stderr.count("a launcher started 2 processes") == 1
    command += ["--set", "engine.workers=0"]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    ours = [line for line in refused.stderr.splitlines() if line.startswith("scaletune: ")]
    assert refused.returncode and len(ours) == 2 and "`engine.workers`" in ours[1]
