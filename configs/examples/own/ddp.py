"""Trains the model of train.py on several GPUs, or CPU cores: an ordinary torchrun script.

`torchrun --standalone --nproc_per_node=2 ddp.py --lr=0.01`. The processes share each batch, so the
loss is that of train.py up to rounding. One process reports.
"""

import os

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from train import GPT, evaluate, load_text, loss_of, lr_share, parser, sample

import scaletune.trial


def main():
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert args.batch_size % world == 0, "the processes must get equal parts of a batch"
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    torch.manual_seed(args.seed)
    text = load_text().to(device)
    train, val = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    model = GPT(args.width, args.layers, args.block_size).to(device)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=args.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: lr_share(i, args.steps))
    n_params = sum(p.numel() for p in model.blocks.parameters())
    generator = torch.Generator().manual_seed(args.seed)
    for step in range(1, args.steps + 1):
        tokens, targets = sample(train, args, generator)  # the whole batch, the same everywhere
        loss = loss_of(ddp, (tokens[rank::world], targets[rank::world]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 and rank == 0:
            val_loss = evaluate(model, val, args)
            print(f"step {step}: val loss {val_loss:.4f}")
            seen = step * args.batch_size * args.block_size  # tokens of all processes
            scaletune.trial.report(tokens=seen, loss=val_loss, n_params=n_params)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
