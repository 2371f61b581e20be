"""A run logged by Weights & Biases offline, and read back by its own schema. Run by `test_loggers.py`: `python -m tests.train.wandb_run FOLDER`."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import wandb
from wandb.proto import wandb_internal_pb2

from fxopt.train.loggers import WandB
from tests.train.small import run


BLOCK, HEAD = 32768, 7


def records(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: blocks of chunks [crc 4, length 2, kind 1, data]; 1 is whole, 2, 3, 4 are first, middle, last."""
    at, kept = HEAD, b""
    while at + HEAD <= len(content):
        if BLOCK - at % BLOCK < HEAD:  # too little is left of the block for a head
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", content[at + 4: at + HEAD])
        kept += content[at + HEAD: at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):
            yield kept
            kept = b""


def main(folder: Path) -> None:
    """Prints the losses, and then those that the file holds."""
    logger = WandB(wandb.init(mode="offline", dir=str(folder), project="fxopt"))
    result, _ = run(loggers=[logger], output_dir=folder / "run", checkpoints=False)
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found, settings = [], {}
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "loss" in row:
            found.append((row["_step"], row["loss"]))
        for item in record.config.update:
            settings[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    print(json.dumps({"losses": result.losses, "found": found, "lr": settings["lr"]}))


main(Path(sys.argv[1]))
