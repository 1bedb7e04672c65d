"""Trains a small GPT-2 on source code with Hugging Face's Trainer: an ordinary script.

`scaletune sweep hf-trainer.toml` reads the result in the state that the Trainer saves. With
`--report`, a callback reports each evaluation while it trains: see `Report`.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

parser = argparse.ArgumentParser()
parser.add_argument("--width", type=int, default=32)
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--block-size", type=int, default=32)
parser.add_argument("--max-steps", type=int, default=100)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--output-dir", default="out")
parser.add_argument("--report", action="store_true", help="report to scaletune while it trains")


class Report(TrainerCallback):
    """Reports each evaluation to scaletune, and stops where scaletune asks for it."""

    def __init__(self, tokens_per_step):
        self.tokens_per_step = tokens_per_step

    def on_evaluate(self, args, state, control, metrics, **_):
        import scaletune.trial

        tokens = state.global_step * self.tokens_per_step
        scaletune.trial.report(tokens=tokens, loss=metrics["eval_loss"])
        control.should_training_stop |= scaletune.trial.should_stop


def load_examples(block_size):
    """Modules of Python's standard library as sequences of bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "ast", "datetime", "doctest", "inspect", "pathlib", "typing", "zipfile")
    text = b"".join((folder / f"{name}.py").read_bytes() for name in names)
    starts = range(0, len(text) - block_size, block_size)
    blocks = [torch.tensor(list(text[i : i + block_size])) for i in starts]
    return [{"input_ids": block, "labels": block} for block in blocks]


def main():
    args = parser.parse_args()
    examples = load_examples(args.block_size)
    n_train = int(0.9 * len(examples))
    torch.manual_seed(args.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=args.block_size,
            n_embd=args.width,
            n_layer=2,
            n_head=args.width // 16,
            bos_token_id=None,
            eos_token_id=None,
            initializer_range=0.1,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=args.output_dir,
            learning_rate=args.learning_rate,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            warmup_steps=args.max_steps // 10,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=64,
            eval_strategy="steps",
            eval_steps=args.max_steps // 2,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=examples[:n_train],
        eval_dataset=examples[n_train : n_train + 256],
        callbacks=[Report(args.batch_size * args.block_size)] if args.report else [],
    )
    trainer.train()
    trainer.save_model()  # with config.json, from which the parameters are counted
    trainer.save_state()  # trainer_state.json


if __name__ == "__main__":
    main()
