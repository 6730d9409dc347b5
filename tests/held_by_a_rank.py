"""The first batch of the tiny run of conftest.py under DeepSpeed, then RUN/<rank>.json with what the rank holds in
bytes: RUN SHARDS."""

import json
import sys
from pathlib import Path

import torch
from conftest import tiny_trainer

if __name__ == "__main__":
    run, shards = map(Path, sys.argv[1:])
    trainer = tiny_trainer(run / "run", shards)
    zero, rank = trainer.state.zero, trainer.accelerator.process_index
    buckets, real = [], getattr(zero, "setup_buckets", None)

    def look():
        found = [bucket.buffer for bucket in zero.ipg_buckets.values()]
        tensors = [t for one in found for t in ([one] if isinstance(one, torch.Tensor) else one)]
        buckets.append(sum(t.nbytes for t in tensors))

    def watched():
        real()
        look()

    if real is not None:  # stages 1 and 2 drop them after the backward pass
        zero.setup_buckets = watched
    trainer.learn(next(trainer.feed.batches(0, 8, rank, 2)))
    if real is None:
        look()
    held = {
        "moments": sum(v.nbytes for slots in zero.optimizer.state.values() for k, v in slots.items() if k != "step"),
        "copies": sum(flat.nbytes for _, flat in trainer.state._groups()),
        "buckets": max(buckets),
        "gradients": zero.grad_partitions_flat_buffer.nbytes if trainer.state.partitioned else 0,
    }
    (run / f"{rank}.json").write_text(json.dumps(held))
    trainer.accelerator.end_training()
