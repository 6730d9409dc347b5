"""A run of the tiny ALAE of conftest.py as a program, to be started by any launcher: RUN SHARDS PRECISION MICROBATCHES.

The programs of launch/ start from the published constant of ones, after which one bias has a gradient of rounding
alone; Adam turns that into steps, and two float32 runs that differ by an addition's order soon differ visibly.
"""

import sys
from pathlib import Path

from conftest import tiny_alae_trainer

if __name__ == "__main__":
    run, shards, precision, microbatches = sys.argv[1:]
    training = {"precision": precision, "microbatch": tuple(map(int, microbatches.split(",")))}
    trainer = tiny_alae_trainer(Path(run), Path(shards), training=training, intervals={"checkpoint": 64})
    code = trainer.train()
    trainer.accelerator.end_training()
    sys.exit(code)
