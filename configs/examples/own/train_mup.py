"""train.py in muP: the same training, whose model and optimizer follow the plan of the trial.

Two lines differ from `main` in train.py. They change nothing when the script is started by hand.
"""

import torch
from torch import nn
from train import GPT, evaluate, load_text, loss_of, lr_share, parser, sample

import scaletune.trial


def main():
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    text = load_text()
    train, val = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    model = scaletune.trial.apply_plan(GPT(args.width, args.layers, args.block_size))  # changed
    groups = scaletune.trial.param_groups(model)  # changed: in place of model.parameters()
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_share(i, args.steps))
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(1, args.steps + 1):
        loss = loss_of(model, sample(train, args, generator))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            val_loss = evaluate(model, val, args)
            print(f"step {step}: train loss {loss.item():.4f}, val loss {val_loss:.4f}")
            seen = step * args.batch_size * args.block_size
            scaletune.trial.report(tokens=seen, loss=val_loss)


if __name__ == "__main__":
    main()
