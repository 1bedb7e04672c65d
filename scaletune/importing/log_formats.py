"""The lines that training programs print, as patterns: one `LogFormat` for each program.

A pattern's named groups are metrics, except `step` (the iteration), `plan` (the planned number of
iterations), and `key` with `value` (a metric that the line names itself).

Sources, at the commits or releases that the tests name: karpathy/nanoGPT train.py,
KellerJordan/modded-nanogpt train_gpt.py, NVIDIA/Megatron-LM training.py, EleutherAI/gpt-neox
logging.py, pytorch/torchtitan metrics.py, allenai/OLMo-core console_logger.py, allenai/OLMo
train.py, karpathy/llm.c train_gpt2.cu and logger.h, Lightning-AI/litgpt pretrain.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scaletune.importing import log_settings
from scaletune.importing.run import Setting

N = r"[-+]?(?:\d[\d,]*(?:\.\d*)?(?:[eE][-+]?\d+)?|(?i:nan|inf(?:inity)?))"
"""A number as programs print it: 1,024 or 3.2E+00 or nan."""


def _metric(name: str) -> str:
    return rf"(?P<{name}>{N})"


STEP, PLAN = r"(?P<step>\d[\d,]*)", r"(?P<plan>\d[\d,]*|\?+)"


@dataclass(frozen=True)
class LogFormat:
    """What one program prints."""

    program: str
    """Name of the program."""

    hints: tuple[str, ...]
    """A line that matches `lines` contains one of these texts: a fast test."""

    lines: tuple[re.Pattern[str], ...]
    """Lines that hold metrics. One without `step` belongs to the last step printed."""

    more: dict[str, re.Pattern[str]] = field(default_factory=dict)
    """Metrics that are searched for in the line that the first pattern matched."""

    read_settings: Callable[[Sequence[str]], dict[str, Setting]] = log_settings.none
    """Settings from the lines before the first step."""

    header: re.Pattern[str] = re.compile(r"(?!)")
    """A line that is printed when the program starts, and only then."""

    end: str = ""
    """Text that is printed when all planned steps are made."""

    is_ordered: bool = True
    """Whether a step is printed after all earlier ones; metrics may be collected late."""


NANOGPT = LogFormat(
    program="nanoGPT",
    hints=("iter ", "step "),
    lines=(
        re.compile(rf"^iter {STEP}: loss {_metric('train_loss')}, time "),
        re.compile(
            rf"^step {STEP}: train loss {_metric('train_loss_estimate')},"
            rf" val loss {_metric('val_loss')}"
        ),
    ),
    more={"lr": re.compile(rf"\b(?:lr|learning_rate):? {_metric('lr')}")},
    read_settings=log_settings.read_nanogpt,
    header=re.compile(
        r"^(Overriding|tokens per iteration will be|number of parameters: |num (non-)?decayed )"
    ),
)
MODDED_NANOGPT = LogFormat(
    program="modded-nanogpt",
    hints=("step:",),
    lines=(re.compile(rf"^step:{STEP}/{PLAN} (?=.*\b(?:train_time|step_avg):)"),),
    more={
        "val_loss": re.compile(rf"\bval_loss:{_metric('val_loss')}"),
        "train_loss": re.compile(rf"\btrain_loss:{_metric('train_loss')}"),
    },
    header=re.compile(r"^={20,}$|^import "),
)
MEGATRON = LogFormat(
    program="Megatron-LM",
    hints=("iteration", "validation loss", "validation results"),
    lines=(
        re.compile(rf"iteration +{STEP}/ *{PLAN} \|"),
        re.compile(
            rf"validation (?:loss|results) at iteration +{STEP}\b(?!.*\btest set)"
            rf".*?\| *lm[ _]loss value: {_metric('val_loss')}"
        ),
        re.compile(
            r"validation (?:loss|results) at the end of training for val\w* data"
            rf".*?\| *lm[ _]loss value: {_metric('val_loss')}"
        ),
        re.compile(
            rf"validation loss at iteration +{STEP} on test set"
            rf".*?\| *lm[ _]loss value: {_metric('test_loss')}"
        ),
    ),
    more={
        "train_loss": re.compile(rf"lm[ _]loss: +{_metric('train_loss')}"),
        "lr": re.compile(rf"learning rate: +{_metric('lr')}"),
        "consumed_samples": re.compile(rf"consumed samples: +{_metric('consumed_samples')}"),
        "consumed_tokens": re.compile(rf"consumed tokens: +{_metric('consumed_tokens')}"),
        "batch_size": re.compile(rf"global batch size: +{_metric('batch_size')}"),
        "nan_iterations": re.compile(rf"number of nan iterations: +{_metric('nan_iterations')}"),
    },
    read_settings=log_settings.read_megatron,
    header=re.compile(r"^ *-{8,} (end of )?arguments -{8,}|number of parameters on "),
)
TORCHTITAN = LogFormat(
    program="torchtitan",
    hints=("step: ",),
    lines=(
        re.compile(rf"validate step: +{STEP} +loss: +{_metric('val_loss')} "),
        re.compile(
            rf"step: +{STEP} +loss: +{_metric('train_loss')} "
            r"(?=.*\b(?:memory|tps|wps|grad_norm):)"
        ),
    ),
    read_settings=log_settings.read_torchtitan,
    header=re.compile(
        r"\bRunning with (?:args|configs?): |total parameters|Trainer is initialized"
    ),
    end="Training completed",
)
OLMO = LogFormat(
    program="OLMo-core",
    hints=("[step=", "="),
    lines=(
        re.compile(rf"\[step={STEP}/{PLAN}[,\]]"),
        re.compile(rf"^    (?P<key>[A-Za-z][^=]*)=(?P<value>{N}[KMBTPE]?)$"),
    ),
    read_settings=log_settings.read_olmo,
    header=re.compile(r"Built model with:|Total number of parameters: "),
    is_ordered=False,
)
LLM_C = LogFormat(
    program="llm.c",
    hints=("step ", "val loss ", "s:"),
    lines=(
        re.compile(rf"^step +{STEP}/{PLAN} \| (?:train )?loss +{_metric('train_loss')}\b"),
        re.compile(rf"^val loss {_metric('val_loss')}"),
        re.compile(rf"^s:{STEP} tel:{_metric('val_loss')}"),
        re.compile(rf"^s:{STEP} trl:{_metric('train_loss')}(?: lr:{_metric('lr')})?"),
    ),
    more={"lr": re.compile(rf"lr +{_metric('lr')}")},
    read_settings=log_settings.read_llm_c,
    header=re.compile(r"^\| Parameter +\| Value"),
)
LITGPT = LogFormat(
    program="litgpt",
    hints=("iter ", "val loss", "Total tokens"),
    lines=(
        re.compile(rf"^Epoch \d+ \| iter \d+ step {STEP} \| loss train: {_metric('train_loss')},"),
        re.compile(rf"^iter \d+: val loss {_metric('val_loss')}, val time"),
        re.compile(rf"^Final evaluation \| val loss: {_metric('val_loss')}"),
        re.compile(rf"^\| - Total tokens +: {_metric('total_tokens')}"),
    ),
    read_settings=log_settings.read_litgpt,
    header=re.compile(r"^\{'|^Total parameters: "),
)

FORMATS = (NANOGPT, MODDED_NANOGPT, MEGATRON, TORCHTITAN, OLMO, LLM_C, LITGPT)

PROGRAMS = (
    "nanoGPT, modded-nanogpt, Megatron-LM, GPT-NeoX, torchtitan, OLMo-core, OLMo, llm.c and litgpt"
)
"""The programs whose logs are read, for messages."""


def find_format(line: str) -> LogFormat | None:
    """The format whose lines with a step match."""
    for log_format in FORMATS:
        if any(hint in line for hint in log_format.hints):
            for pattern in log_format.lines:
                if "step" in pattern.groupindex and pattern.search(line):
                    return log_format
    return None
