"""Encode SHARDS to OUT in small shards, with a fault in rank 1: SHARDS OUT none|kill|unreadable|bug. To be launched.

The fault strikes in the third batch of rank 1, when several shards are whole.
"""

import os
import signal
import sys
from pathlib import Path

import torch
from plain_autoencoders import Flat

from letit_dist.data.encoding import EncodeOptions, Ranks, encode_domain
from letit_dist.data.folders import open_images_of
from letit_dist.errors import UserError, reports_errors

RANK = int(os.environ.get("RANK", "0"))


def faulty(autoencoder: Flat, fault: str) -> Flat:
    """The autoencoder, which does what `fault` says when it encodes for the fifth time (two views a batch)."""
    calls, encode = [], autoencoder.encode

    def strike(images):
        calls.append(len(images))
        if RANK == 1 and len(calls) == 5:
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "unreadable":
                raise UserError("picture.png: cannot be read")
            if fault == "bug":
                raise ZeroDivisionError("a bug in one rank")
        return encode(images)

    autoencoder.encode = strike
    return autoencoder


@reports_errors
def main() -> int:
    shards, out, fault = sys.argv[1:]
    ranks = Ranks()
    if "RANK" in os.environ:
        from letit_dist.training.setup import join_ranks

        rank, world, _, gather = join_ranks(timeout=60)
        ranks = Ranks(rank, world, gather)
    torch.manual_seed(0)
    options = EncodeOptions(flip=True, batch=2, shard_bytes=10_240)
    line = encode_domain(faulty(Flat(32), fault), open_images_of([shards]), Path(out), options, ranks=ranks)
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
