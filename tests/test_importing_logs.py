"""Runs read from text logs, and from the files of Lightning and levanter.

Logs of litgpt and OLMo-core, and the files of Lightning and levanter, are written by the real
programs (tests/fixtures/make_logs.py). The other programs need a GPU: their logs are composed here,
line by line, after the format strings of

- karpathy/nanoGPT train.py, model.py and configurator.py, and a public log;
- NVIDIA/Megatron-LM megatron/training/training.py and arguments.py, as of 2026;
- EleutherAI/gpt-neox megatron/logging.py (018b8a9);
- pytorch/torchtitan torchtitan/components/metrics.py and trainer.py (release 0.3.0; 00fbaaf);
- karpathy/llm.c train_gpt2.cu (00247dc) and llmc/logger.h;
- KellerJordan/modded-nanogpt train_gpt.py, and its public logs (45b7c37);
- allenai/OLMo olmo/train.py (release 0.6.0).
"""

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaletune import importing
from scaletune.errors import UserError
from scaletune.importing import levanter, lightning_csv, logs
from scaletune.importing.log_formats import FORMATS

FILES = Path(__file__).parent / "fixtures"
PLAN, EVERY, WARMUP = 1000, 50, 100
VOCAB, WIDTH, DEPTH, CONTEXT, BATCH = 512, 64, 4, 128, 32
N_PARAMS = 12 * DEPTH * WIDTH**2
EMBEDDING, POSITIONS = VOCAB * WIDTH, CONTEXT * WIDTH


def loss_at(step, lr):
    return 3.0 + math.log10(lr / 2e-3) ** 2 + 1.0 / (1 + step / 100)


def lr_at(step, lr):
    return lr * step / WARMUP if step < WARMUP else lr * (1 - 0.9 * (step - WARMUP) / 900)


def steps_of(first, last):
    return range(first, last + 1, EVERY)


# --- logs, line by line ---------------------------------------------------------------------------


def nanogpt(lr, first=0, last=PLAN, loss=loss_at):
    total = N_PARAMS + EMBEDDING + POSITIONS
    header = [
        "Overriding config with config/proxy.py:",
        "# a small model",
        "",
        "out_dir = 'out-proxy'",
        f"batch_size = {BATCH // 8}",
        "gradient_accumulation_steps = 2 * 4 # 8",
        f"n_layer = {DEPTH}",
        f"n_embd = {WIDTH}",
        f"block_size = {CONTEXT}",
        f"max_iters = {PLAN}",
        f"Overriding: learning_rate = {lr}",
        f"tokens per iteration will be: {BATCH * CONTEXT:,}",
        f"found vocab_size = {VOCAB} (inside data/proxy/meta.pkl)",
        "Initializing a new model from scratch" if first == 0 else "Resuming training from out",
        f"number of parameters: {(N_PARAMS + EMBEDDING) / 1e6:.2f}M",
        f"num decayed parameter tensors: 18, with {total - 576:,} parameters",
        "num non-decayed parameter tensors: 9, with 576 parameters",
        "using fused AdamW: False",
    ]
    lines = []
    for step in steps_of(first, last):
        value = loss(step, lr)
        if step % 250 == 0:
            lines.append(f"step {step}: train loss {value:.4f}, val loss {value:.4f}")
            lines.append("saving checkpoint to out-proxy")
        lines.append(f"iter {step}: loss {value:.4f}, time 213.42ms, mfu 12.34%")
    return [*header, *lines]


def megatron(lr, first=0, last=PLAN, loss=loss_at, arguments=True):
    settings = {
        "global_batch_size": BATCH,
        "hidden_size": WIDTH,
        "lr": lr,
        "lr_decay_iters": "None",
        "max_position_embeddings": CONTEXT,
        "min_lr": lr / 10,
        "num_layers": DEPTH,
        "pipeline_model_parallel_size": 1,
        "position_embedding_type": "rope",
        "rampup_batch_size": "None",
        "seq_length": CONTEXT,
        "tensor_model_parallel_size": 1,
        "train_iters": PLAN,
        "untie_embeddings_and_output_weights": True,
    }
    header = [
        "------------------------ arguments ------------------------",
        *(f"  {name} {'.' * (48 - len(name))} {value}" for name, value in settings.items()),
        "-------------------- end of arguments ---------------------",
        f" > padded vocab (size: {VOCAB - 15}) with 15 dummy tokens (new size: {VOCAB})",
        " > number of parameters on (tensor, pipeline) model parallel rank (0, 0): "
        f"{N_PARAMS + 2 * EMBEDDING}",
    ]
    lines = []
    for step in steps_of(max(first, EVERY), last):
        value = loss(step, lr)
        text = "" if math.isnan(value) else f" lm loss: {value:.6E} |"
        lines.append(
            f" [2026-01-01 00:00:00.123456] iteration {step:8d}/{PLAN:8d} | consumed samples:"
            f" {step * BATCH:12d} | elapsed time per iteration (ms): 100.0 | learning rate:"
            f" {lr_at(step, lr):.6E} | global batch size: {BATCH:5d} |{text} loss scale: 1.0 |"
            " grad norm: 0.300 | number of skipped iterations:   0 | number of nan iterations:"
            f" {EVERY if math.isnan(value) else 0:3d} |"
        )
        if step % 250 == 0 and not math.isnan(value):
            lines += ["-" * 90]
            lines.append(
                f" validation loss at iteration {step} on validation set | lm loss value:"
                f" {value:.6E} | lm loss PPL: {math.exp(value):.6E} | "
            )
            lines += ["-" * 90]
    return [*(header if arguments else []), *lines]


def neox(lr, first=0, last=PLAN, loss=loss_at):
    settings = {
        "hidden_size": WIDTH,
        "lr": lr,
        "no_weight_tying": True,
        "num_layers": DEPTH,
        "padded_vocab_size": VOCAB,
        "pos_emb": "rotary",
        "seq_length": CONTEXT,
        "train_batch_size": BATCH,
        "train_iters": PLAN,
    }
    header = [
        "-------------------- arguments --------------------",
        *(
            f"  {name} {'.' * (32 - len(name))} {value!s}{'.' * 24}updated"
            for name, value in settings.items()
        ),
        "---------------- end of arguments ----------------",
        "[2026-01-01 00:00:00,123] [INFO] [engine.py:139:__init__] RANK=0 STAGE=0 LAYERS=9 [0, 9)"
        f" STAGE_PARAMS={N_PARAMS + 2 * EMBEDDING} (0.2M)"
        f" TOTAL_PARAMS={N_PARAMS + 2 * EMBEDDING} (0.2M)"
        f" UNIQUE_PARAMS={N_PARAMS + 2 * EMBEDDING} (0.2M)",
    ]
    lines = []
    for step in steps_of(max(first, EVERY), last):
        value = loss(step, lr)
        lines.append(
            f" samples/sec: 51.234 | iteration {step:8d}/{PLAN:8d} | elapsed time per iteration"
            f" (ms): 625.0 | learning rate: {lr_at(step, lr):.3E} | approx flops per GPU:"
            f" 150.3TFLOPS | lm_loss: {value:.6E} | number of skipped iterations:   0 | number of"
            " nan iterations:   0 |"
        )
        if step % 250 == 0:
            lines.append(
                f" validation results at iteration {step} | lm_loss value: {value:.6E} |"
                f" lm_loss_ppl value: {math.exp(value):.6E} | "
            )
    return [*header, *lines]


def torchtitan(lr, first=0, last=PLAN, loss=loss_at):
    config = {
        "model": {"name": "llama3", "flavor": "proxy"},
        "optimizer": {"name": "AdamW", "lr": lr, "weight_decay": 0.1},
        "training": {"steps": PLAN, "seq_len": CONTEXT, "local_batch_size": BATCH},
    }
    mark = "[titan] 2026-01-01 00:00:00,123 - root - INFO - "
    header = [
        *f"{mark}Running with configs: {json.dumps(config, indent=2)}".split("\n"),
        f"{mark}Building llama3 proxy with TransformerModelArgs(_enforced='x', dim={WIDTH},"
        f" n_layers={DEPTH}, n_heads=4, n_kv_heads=None, vocab_size={VOCAB}, norm_eps=1e-05)",
        f"{mark}\x1b[34mModel llama3 proxy \x1b[31msize: {N_PARAMS + 2 * EMBEDDING:,} total"
        " parameters\x1b[39m",
        f"{mark}Trainer is initialized with local batch size {BATCH // 4}, global batch size"
        f" {BATCH}, gradient accumulation steps 4, sequence length {CONTEXT}, total steps {PLAN}"
        f" (warmup {WARMUP})",
        f"{mark}Training starts at step {first + 1}",
    ]
    lines = []
    for step in steps_of(max(first, EVERY), last):
        value = loss(step, lr)
        lines.append(
            f"{mark}\x1b[31mstep: {step:2}  \x1b[32mloss: {value:8.5f}  \x1b[38;2;180;60;0m"
            "grad_norm:  0.1234  \x1b[38;2;54;234;195mmemory:  1.24GiB(1.30%)  \x1b[34mtps: 1,234"
            "  \x1b[36mtflops: 1.23  \x1b[35mmfu: 1.23%\x1b[39m"
        )
        if step % 250 == 0:
            lines.append(
                f"{mark}\x1b[33mvalidate step: {step:2}  \x1b[32mloss: {value:7.4f}  \x1b[38;2;54;"
                "234;195mmemory:  1.24GiB(1.30%)  \x1b[34mtps: 1,234\x1b[39m"
            )
    return [*header, *lines, *([f"{mark}Training completed"] if last == PLAN else [])]


def llm_c(lr, first=0, last=PLAN, loss=loss_at):
    rows = {
        "Parameter": "Value",
        "train data pattern": "dev/data/fineweb/*.bin",
        "micro batch size B": 4,
        "sequence length T": CONTEXT,
        "total batch size": BATCH * CONTEXT,
        "LR scheduler": "cosine",
        "learning rate (LR)": f"{lr:e}",
        "weight decay": f"{0.1:e}",
        "max_steps": -1,
        "max_sequence_length T": CONTEXT,
        "padded_vocab_size Vp": VOCAB,
        "num_layers L": DEPTH,
        "channels C": WIDTH,
        "num_parameters": N_PARAMS + EMBEDDING + POSITIONS,
        "train_num_batches": PLAN,
    }
    header = [f"| {name:<21} | {value!s:<50} |" for name, value in rows.items()]
    lines = [f"val loss {11.0 if first == 0 else loss(first, lr):f}"]
    for step in steps_of(max(first, EVERY), last):
        value = loss(step, lr)
        lines.append(
            f"step {step:4d}/{PLAN} | loss {value:8.6f} (+0.12z)| norm 0.3000 (-0.34z)| lr"
            f" {lr_at(step, lr):.2e} | 123.45 ms | 45.6% bf16 MFU | 123456 tok/s"
        )
        if step % 250 == 0:
            lines.append(f"val loss {value:f}")
    return [*header, *lines]


PROGRAMS = {
    "nanogpt": nanogpt,
    "megatron": megatron,
    "neox": neox,
    "torchtitan": torchtitan,
    "llm_c": llm_c,
}
every_program = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def only(path):
    (run,) = logs.read(path)
    return run


# --- each program ---------------------------------------------------------------------------------


@every_program
def test_a_sweep_of_logs_has_the_columns_of_a_fit(program, tmp_path):
    """Shape, tokens, peak lr and held-out loss, as the composed runs have them."""
    lrs = (5e-4, 1e-3, 2e-3, 4e-3)
    for lr in lrs:
        write(tmp_path / f"lr{lr:g}" / "train.log", program(lr))
    table, notes = importing.trials(tmp_path)
    table = table.sort_values("lr")
    assert list(table["lr"]) == pytest.approx(lrs)
    assert set(table["status"]) == {"done"}
    assert list(table["n_params"]) == [N_PARAMS] * len(lrs)
    assert list(table["tokens"]) == [PLAN * BATCH * CONTEXT] * len(lrs)
    assert list(table["batch_tokens"]) == [BATCH * CONTEXT] * len(lrs)
    assert list(table["loss"]) == pytest.approx([loss_at(PLAN, lr) for lr in lrs], abs=1e-4)
    assert sorted(table["id"]) == sorted(f"lr{lr:g}" for lr in lrs)
    assert any("n_params" in note for note in notes)


@every_program
@pytest.mark.parametrize(
    "lines",
    [
        ["slurmstepd: error: *** JOB 1 ON n1 CANCELLED AT 2026-01-01 DUE TO TIME LIMIT ***"],
        [
            "Traceback (most recent call last):",
            '  File "train.py", line 1, in <module>',
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ],
        [],
    ],
    ids=["time limit", "out of memory", "no reason"],
)
def test_a_killed_run_is_unfinished_with_the_reason(program, lines, tmp_path):
    for lr in (5e-4, 1e-3, 2e-3):
        write(tmp_path / f"{lr:g}.out", program(lr))
    write(tmp_path / "killed.out", program(4e-3, last=400) + lines)
    table, _ = importing.trials(tmp_path)
    killed = table.set_index("id").loc["killed"]
    assert killed["status"] == "failed"
    reason = {0: "400", 1: "TIME LIMIT", 3: "CUDA out of memory"}[len(lines)]
    assert reason in killed["message"]
    assert set(table.set_index("id").drop("killed")["status"]) == {"done"}


@every_program
def test_an_error_after_the_last_step_does_not_spoil_a_run(program, tmp_path):
    lines = [*program(1e-3), "Traceback (most recent call last):", "BrokenPipeError: [Errno 32]"]
    table, _ = importing.trials(write(tmp_path / "a.log", lines))
    assert list(table["status"]) == ["done"]


@every_program
def test_a_loss_that_ends_as_nan_has_diverged(program, tmp_path):
    def loss(step, lr):
        return math.nan if step > 600 else loss_at(step, lr)

    table, _ = importing.trials(write(tmp_path / "a.log", program(1e-3, loss=loss)))
    assert list(table["status"]) == ["diverged"]


@every_program
@pytest.mark.parametrize("overlap", [0, 100])
@pytest.mark.parametrize("files", [1, 2])
def test_a_resumed_run_is_one_run(program, overlap, files, tmp_path):
    """In one file or in two; of steps that both printed, the later values count."""
    first = program(1e-3, last=500, loss=lambda step, lr: 9.0)
    second = program(1e-3, first=550 - overlap)
    if files == 1:
        write(tmp_path / "slurm-1.out", [*first, "Killed", *second])
    else:
        write(tmp_path / "slurm-1.out", [*first, "Killed"])
        write(tmp_path / "slurm-2.out", second)
    run = only(tmp_path)
    assert run.id == "slurm-1"
    assert run.status == "done"
    assert run.history["iteration"] == [(PLAN, PLAN)]
    key = "train_loss"
    assert [step for step, _ in run.history[key]] == list(steps_of(run.history[key][0][0], PLAN))
    assert {step for step, value in run.history[key] if value == 9.0} == {
        step for step in steps_of(run.history[key][0][0], 500 - overlap)
    }
    assert any("started again" in note for note in run.notes)


@every_program
def test_two_runs_in_one_file_are_two_runs(program, tmp_path):
    runs = logs.read(write(tmp_path / "all.log", [*program(1e-3), *program(2e-3)]))
    assert [run.id for run in runs] == ["all", "all-2"]
    names = ("lr", "learning_rate", "optimizer.lr")
    lrs = [next(run.config[name] for name in names if name in run.config) for run in runs]
    assert lrs == [1e-3, 2e-3]
    for run, lr in zip(runs, lrs, strict=True):
        assert run.row()["val_loss"] == pytest.approx(loss_at(PLAN, lr), abs=1e-4)
        assert run.row()["status"] == "done"


@every_program
def test_a_failed_start_with_the_same_settings_is_replaced(program, tmp_path):
    lines = [*program(1e-3, last=200), "Killed", *program(1e-3)]
    run = only(write(tmp_path / "a.log", lines))
    assert run.status == "done"
    assert run.row()["val_loss"] == pytest.approx(loss_at(PLAN, 1e-3), abs=1e-4)


@every_program
def test_a_run_resumed_with_another_lr_is_no_run_of_either(program, tmp_path):
    lines = [*program(1e-3, last=500), *program(4e-3, first=550)]
    run = only(write(tmp_path / "a.log", lines))
    if {"lr", "learning_rate"} & run.config.keys():
        assert run.status == "failed"
        assert "another learning rate: 0.001, then 0.004" in run.message


def decorate(lines, rank, time, colour, bar):
    for number, line in enumerate(lines):
        stamp = "2026-01-01T00:00:00.123 " if time else ""
        text = f"\x1b[32m{line}\x1b[0m" if colour else line
        yield f"{rank}{stamp}{text}" if "\x1b" not in line else f"{rank}{line}"
        if bar and "loss" in line:
            yield f"training: {number}%|###   | 3/10\rtraining: {number + 1}%|###   | 4/10"


@every_program
@given(
    rank=st.sampled_from(["", "0: ", "[rank0]:", "[rank0]: ", "[default0]:", "12: "]),
    time=st.booleans(),
    colour=st.booleans(),
    bar=st.booleans(),
)
def test_decoration_of_lines_changes_nothing(program, rank, time, colour, bar, tmp_path_factory):
    """Prefixes of ranks, time stamps, colours, and the carriage returns of progress bars."""
    folder = tmp_path_factory.mktemp("logs")
    plain = only(write(folder / "a.log", program(1e-3)))
    time = time and program in (nanogpt, llm_c)  # the others print a time of their own
    lines = list(decorate(program(1e-3), rank, time, colour, bar))
    decorated = only(write(folder / "a.log", lines))
    assert decorated.history == plain.history
    assert decorated.config == plain.config


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_logs_of_windows(encoding, end, tmp_path):
    path = tmp_path / "a.log"
    path.write_bytes((end.join(nanogpt(1e-3)) + end).encode(encoding))
    assert logs.looks_like_log(path)
    assert only(path).row() == only(write(tmp_path / "b" / "a.log", nanogpt(1e-3))).row()


@pytest.mark.parametrize("reason", [[], ["Killed"]])
def test_runs_without_settings_are_not_joined(reason, tmp_path):
    """Their learning rates may differ: a second start is another run unless it says so."""
    lines = [line for line in nanogpt(1e-3) if line.startswith(("iter", "step"))]
    runs = logs.read(write(tmp_path / "a.log", [*lines[:20], *reason, *lines]))
    assert [run.id for run in runs] == ["a", "a-2"]
    assert [run.status for run in runs] == ["failed" if reason else "done", "done"]


@every_program
def test_lines_of_a_second_rank_are_not_a_second_run(program, tmp_path):
    lines = []
    for line in program(1e-3):
        lines += [f"0: {line}", f"1: {line}"]
    doubled = only(write(tmp_path / "a.log", lines))
    plain = only(write(tmp_path / "b" / "a.log", program(1e-3)))
    assert doubled.row() == plain.row()


# --- learning rates -------------------------------------------------------------------------------


def test_the_lr_is_the_setting_and_else_the_peak_of_what_was_printed(tmp_path):
    with_settings = write(tmp_path / "a" / "a.log", megatron(1.03e-3))
    table, _ = importing.trials(with_settings)
    assert list(table["lr"]) == [1.03e-3]
    run = only(write(tmp_path / "b" / "b.log", megatron(1.03e-3, arguments=False)))
    assert run.row()["lr"] == pytest.approx(1.03e-3)  # printed at step 100, the end of the warmup


def test_a_log_that_starts_after_the_peak_has_no_lr(tmp_path):
    run = only(write(tmp_path / "a.log", megatron(1e-3, first=600, arguments=False)))
    assert "lr" not in run.row()
    assert "starts at step 600" in run.absent["lr"] and "config.json" in run.absent["lr"]


@pytest.mark.parametrize(("lr", "is_read"), [("0.0030", True), ("0.0004", False)])
def test_an_lr_rounded_to_one_digit_is_no_lr(lr, is_read, tmp_path):
    """OLMo-core prints four decimals: 0.0004 may be 0.00035 or 0.00045."""
    lines = []
    for step in (10, 20, 30):
        lines += [f"[step={step}/30,epoch=1]", f"    optim/LR (group 0)={lr}"]
        lines += ["    train/CE loss=3.210", "    throughput/total tokens=1.234B"]
    run = only(write(tmp_path / "a.log", lines))
    assert ("lr" in run.row()) == is_read
    assert ("rounded to 0.0001" in run.absent.get("lr", "")) != is_read
    assert run.row()["throughput/total tokens"] == 1.234e9


def test_settings_beside_the_log_fill_what_it_does_not_print(tmp_path):
    lines = [line for line in nanogpt(1e-3) if line.startswith(("iter", "step"))]
    for lr in (1e-3, 2e-3):
        log = write(tmp_path / f"r{lr:g}" / "log.txt", lines)
        settings = (
            f"optim: {{lr: {lr:.0e}}}\nn_params: 5\nbatch_tokens: 7\n"  # YAML: "1e-03" is text
        )
        log.with_name("config.yaml").write_text(settings)
    table, _ = importing.trials(tmp_path)
    assert sorted(table["lr"]) == [1e-3, 2e-3]
    assert set(table["tokens"]) == {7 * PLAN}
    log.with_name("config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json` must be valid JSON"):
        logs.read(tmp_path)


def test_what_a_log_does_not_print_is_named(tmp_path):
    lines = [line for line in nanogpt(1e-3) if line.startswith(("iter", "step"))]
    run = only(write(tmp_path / "a.log", lines))
    assert "nanoGPT printed no learning rate" in run.absent["lr"]
    assert "nanoGPT printed no number of parameters" in run.absent["n_params"]


# --- real logs ------------------------------------------------------------------------------------


def test_a_real_log_of_litgpt_agrees_with_its_own_csv():
    run = only(FILES / "logs" / "litgpt.log")
    own = pd.read_csv(FILES / "logs" / "litgpt_metrics.csv")
    printed = dict(run.history["train_loss"])
    train = own.dropna(subset="loss")
    by_step = dict(zip(train["iter"] // 2, train["loss"], strict=True))  # 2 batches a step
    assert printed == pytest.approx(by_step, abs=5e-4)
    assert run.row()["val_loss"] == pytest.approx(own["val_loss"].dropna().iloc[-1], abs=5e-4)
    assert own["total_tokens"].max() == run.config["batch_tokens"] * run.row()["iteration"] == 2560
    assert run.config["lr"] == 0.003
    assert run.config["n_params_total"] - run.config["n_params"] == 2 * 64 * 32


def test_a_real_log_of_olmo_core():
    """Its own count of tokens and of parameters; its `non-embedding` includes the readout."""
    run = only(FILES / "logs" / "olmo_core.log")
    row = run.row()
    assert row["throughput/total tokens"] == row["iteration"] * row["batch_tokens"] == 2560
    assert (row["lr"], row["weight_decay"], row["total_steps"]) == (3e-3, 0.01, 20)
    assert (row["n_params_total"], row["n_params"]) == (61600, 59552 - 64 * 32)
    assert row["train_loss"] == 2.643
    assert row["status"] == "done"


def test_lines_of_modded_nanogpt_and_of_the_older_olmo(tmp_path):
    lines = ["import torch", "=" * 100]
    lines += ["step:0/1480 val_loss:10.8258 train_time:0ms step_avg:nanms"]
    lines += [f"step:{n}/1480 train_time:{250 * n}ms step_avg:250.00ms" for n in range(1, 1480)]
    lines += ["step:1480/1480 val_loss:3.2791 train_time:385000ms step_avg:260.00ms"]
    run = only(write(tmp_path / "modded.txt", lines))
    assert run.history["val_loss"] == [(0, 10.8258), (1480, 3.2791)]
    assert run.history["iteration"] == [(1480, 1480)]
    lines = ["[2026-01-01 00:00:00] INFO [olmo.train:967, rank=0] [step=100/200,epoch=0]"]
    lines += ["    train/CrossEntropyLoss=3.456", "    throughput/total_tokens=1,048,576"]
    run = only(write(tmp_path / "olmo" / "olmo.log", lines))
    row = run.row()
    assert (row["train_loss"], row["total_steps"], row["iteration"]) == (3.456, 200, 100)
    assert row["throughput/total_tokens"] == 1048576


def test_the_log_file_of_llm_c(tmp_path):
    lines = ["s:0 tel:11.0120", "s:0 trl:11.0117 lr:0.000001 norm:15.5", "s:250 tel:6.4791"]
    run = only(write(tmp_path / "main.log", lines))
    assert run.history["val_loss"] == [(0, 11.012), (250, 6.4791)]
    assert run.name == tmp_path.name


# --- refusals -------------------------------------------------------------------------------------


def test_a_log_of_an_unknown_program_is_refused_with_the_programs(tmp_path):
    path = write(tmp_path / "mine.log", ["epoch 1 loss=3.2", "epoch 2 loss=3.1"])
    assert not logs.looks_like_log(path)
    with pytest.raises(UserError, match="columns n_params") as error:
        logs.read(path)
    for log_format in FORMATS:
        assert log_format.program in str(error.value)
    with pytest.raises(UserError, match="must hold logs of nanoGPT"):
        logs.read(tmp_path)


def test_the_output_of_a_trainer_names_the_file_to_give(tmp_path):
    line = "{'loss': 3.2, 'grad_norm': 1.0, 'learning_rate': 0.001, 'epoch': 0.1}"
    with pytest.raises(UserError, match=r"trainer_state\.json"):
        logs.read(write(tmp_path / "slurm-1.out", [line]))


@every_program
def test_a_log_is_recognised_after_a_long_header(program, tmp_path):
    lines = [f"source code, line {n}: x = {n}" for n in range(20_000)]
    path = write(tmp_path / "a.txt", [*lines, *program(1e-3)])
    assert logs.looks_like_log(path)
    assert only(path).row()["val_loss"] == pytest.approx(loss_at(PLAN, 1e-3), abs=1e-4)


def test_other_files_of_a_folder_are_skipped(tmp_path):
    write(tmp_path / "run" / "a.log", megatron(1e-3))
    write(tmp_path / "requirements.txt", ["torch", "numpy"])
    (tmp_path / "binary.log").write_bytes(b"\0\1iteration 1/ 2 |\n" * 9)
    assert [run.id for run in logs.read(tmp_path)] == ["run/a"]


def test_files_of_the_same_name_are_different_runs(tmp_path):
    for folder in ("x/lr1", "y/lr1"):
        write(tmp_path / folder / "train.log", megatron(1e-3))
    assert [run.id for run in logs.read(tmp_path)] == ["x/lr1", "y/lr1"]


# --- Lightning ------------------------------------------------------------------------------------


def test_real_runs_of_lightning():
    """The logged lr stays below the peak that `hparams.yaml` gives; steps count from 0."""
    runs = {run.id: run for run in lightning_csv.read(FILES / "lightning")}
    assert set(runs) == {"proxies/version_0", "proxies/version_1"}
    for name, lr in (("proxies/version_0", 0.01), ("proxies/version_1", 0.03)):
        own = pd.read_csv(FILES / "lightning" / name / "metrics.csv")
        row = runs[name].row()
        assert row["val_loss"] == own["val_loss"].dropna().iloc[-1]
        assert row["lr"] == lr and row["lr-AdamW"] == own["lr-AdamW"].max() < lr
        assert row["iteration"] == 40
    table, _ = importing.trials(FILES / "lightning")
    assert sorted(table["lr"]) == [0.01, 0.03]
    assert set(table["tokens"]) == {40 * 4096}


def copy_of_lightning(tmp_path):
    folder = tmp_path / "lightning_logs" / "version_3"
    shutil.copytree(FILES / "lightning" / "proxies" / "version_1", folder)
    return folder


def test_without_hparams_lightning_gives_the_peak_of_the_history(tmp_path):
    folder = copy_of_lightning(tmp_path)
    (folder / "hparams.yaml").unlink()
    (run,) = lightning_csv.read(tmp_path)
    assert run.id == "lightning_logs/version_3"
    assert run.row()["lr-AdamW"] == 0.027  # the last value is 0.003


def test_python_tags_in_hparams_are_never_constructed(tmp_path):
    folder = copy_of_lightning(tmp_path)
    target = tmp_path / "made"
    (folder / "hparams.yaml").write_text(
        f"lr: 3e-2\nwidth: 8\npath: !!python/object/apply:pathlib.Path.mkdir [{target}]\n"
        "model: !!python/object:models.Config\n  depth: 4\nshape: !!python/tuple [1, 2]\n"
    )
    (run,) = lightning_csv.read(folder / "metrics.csv")
    assert (run.config["lr"], run.config["width"]) == (0.03, 8)
    assert "path" not in run.config and not target.exists()


def test_a_loss_of_nan_in_lightning_has_diverged(tmp_path):
    folder = copy_of_lightning(tmp_path)
    with (folder / "metrics.csv").open("a") as file:
        file.write("1,,44,nan,\n")
    (run,) = lightning_csv.read(tmp_path)
    assert run.row()["status"] == "diverged"


def test_a_csv_without_steps_is_not_lightnings(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="must have the column `step`"):
        lightning_csv.read(tmp_path)


# --- levanter -------------------------------------------------------------------------------------


def test_real_runs_of_levanter():
    """The lr in its summary is the last one; the second run stopped at 40 of 100 steps."""
    runs = {run.id: run for run in levanter.read(FILES / "levanter")}
    assert set(runs) == {"lr0.001", "lr0.003"}
    assert not any("optim/learning_rate" in run.history for run in runs.values())
    table, _ = importing.trials(FILES / "levanter")
    table = table.set_index("id")
    assert list(table.loc[["lr0.001", "lr0.003"], "lr"]) == [1e-3, 3e-3]
    assert table.loc["lr0.001", "tokens"] == 100 * 8 * 64
    assert table.loc["lr0.001", "loss"] == pytest.approx(4.1 - 0.99)
    assert list(table["status"]) == ["done", "failed"]
    assert "40 of 100 steps" in table.loc["lr0.003", "message"]


def test_levanter_without_a_configured_lr_has_no_lr(tmp_path):
    record = json.loads((FILES / "levanter" / "lr0.001" / levanter.FILE).read_text())
    del record["config"]["optimizer"]["learning_rate"]
    record["summary"]["eval/loss"] = "NaN"
    path = tmp_path / levanter.FILE
    path.write_text(json.dumps(record) + "\n")
    (run,) = levanter.read(path)
    assert run.row()["status"] == "diverged"
    assert "last, decayed" in run.absent["lr"]
    path.write_text('{"loss": 1}\n')
    with pytest.raises(UserError, match="`config` and the `summary`"):
        levanter.read(path)
