"""What each process of a job reads: start it with python, torchrun or srun.

    torchrun --nproc-per-node 2 examples/read_on_a_cluster.py SHARDS [--batch 16] [--steps 3] [--first-step 0]

SHARDS: a folder with manifest.json, or its URL (https://, s3://, gs://, az://).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from components.prompts import prefix
from data.cluster import place
from data.dataset import Examples
from data.loader import train_loader
from data.mirror import mirror
from data.plan import Plan
from data.reader import ShardReader
from data.remote import Origin
from data.tokens import WorldTokenizer

CACHE = Path("~/.cache/visualrwkv-toolkit").expanduser()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step, over all processes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--first-step", type=int, default=0, help="step to go on at")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()

    here = place()
    folder = Path(args.shards)
    if "://" in args.shards:
        folder = mirror(Origin(args.shards, str(CACHE / "blocks")), CACHE)
    reader = ShardReader(folder)
    examples = Examples(reader, prompt=prefix, tokenizer=WorldTokenizer(), n_image=64, ctx_len=4096)
    plan = Plan(len(examples), args.batch, seed=0, manifest_hash=reader.manifest_hash)
    loader = train_loader(
        examples,
        plan,
        start_step=args.first_step,
        end_step=args.first_step + args.steps,
        rank=here.rank,
        world=here.world,
        workers=args.workers,
    )
    began = time.perf_counter()
    for t, batch in enumerate(loader, args.first_step):
        seconds = time.perf_counter() - began
        shape = tuple(batch.ids.shape)
        keys = list(batch.keys)[:3]
        print(f"rank {here.rank} of {here.world}: step {t} after {seconds:.2f} s: {shape} {keys}")
    print(f"rank {here.rank}: the next step is {plan.state(args.first_step + args.steps)}")


if __name__ == "__main__":
    main()
