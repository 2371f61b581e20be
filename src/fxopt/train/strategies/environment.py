"""Which process of a run this is, as the launcher says: torchrun (and `fxopt launch`), or SLURM."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from fxopt.errors import ProcessError


@dataclass(frozen=True)
class Place:
    """A process among those of a run.

    Attributes:
        rank, world: which, of how many. local: which on its machine: the number of its device. host, port: where rank 0 listens.
        source: who says so.
    """

    rank: int
    world: int
    local: int
    host: str
    port: int
    source: str


def place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """What the launcher's variables say; None where there are none.

    torchrun: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. SLURM (a step of srun): SLURM_PROCID, SLURM_STEP_NUM_TASKS or
    SLURM_NTASKS, SLURM_LOCALID; the first host of SLURM_STEP_NODELIST or SLURM_JOB_NODELIST listens, on MASTER_PORT or a port made from the numbers of
    job and step.

    Raises:
        ProcessError: variables that are missing or are no numbers.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank = _number(environment, "RANK")
        return _checked(Place(rank, _number(environment, "WORLD_SIZE"), _number(environment, "LOCAL_RANK", rank), _text(environment, "MASTER_ADDR"),
                              _number(environment, "MASTER_PORT"), "torchrun"))
    # A batch script itself has SLURM_NTASKS too, but is no task: only srun sets SLURM_STEP_ID.
    if "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        hosts = environment.get("SLURM_STEP_NODELIST") or _text(environment, "SLURM_JOB_NODELIST")
        # Steps of one job may run at once, on the same first host: each has a port of its own.
        port = _number(environment, "MASTER_PORT", 15000 + (_number(environment, "SLURM_JOB_ID", 0) + 997 * _number(environment, "SLURM_STEP_ID")) % 20000)
        world = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", 1))
        return _checked(Place(_number(environment, "SLURM_PROCID"), world, _number(environment, "SLURM_LOCALID", 0),
                              environment.get("MASTER_ADDR") or first_host(hosts), port, "SLURM"))
    return None


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `node[07-09,12],other` gives `node07`, and `rack[1-2]n[01-16]` gives `rack1n01`.

    Raises:
        ProcessError: a text that begins with no host.
    """
    found = re.match(r"(?:[^\[\],]|\[\w[^\]]*\])+", nodes)
    if found is None or nodes[found.end() :][:1] not in ("", ","):
        raise ProcessError(f"{nodes!r} is no list of hosts.", where="SLURM_STEP_NODELIST or SLURM_JOB_NODELIST", do="Set MASTER_ADDR to the host of rank 0.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0])


def _checked(found: Place) -> Place:
    if not 0 <= found.rank < found.world:
        raise ProcessError(f"This is rank {found.rank} of {found.world} processes.", where=f"the environment ({found.source})", do="Ranks count from 0.")
    return found


def _text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        raise ProcessError(f"{name} is not set.", where="the environment", do="Start the processes with torchrun, `fxopt launch` or srun, or set it.")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    value = _text(environment, name)
    if not value.isdecimal():
        raise ProcessError(f"{name} is {value!r}, which is no number.", where="the environment")
    return int(value)
