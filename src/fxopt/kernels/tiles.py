"""How the Triton kernels of the norms cut [rows, width] into tiles. Plain numbers: nothing here needs Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.kernels.blocks import as_rows
from fxopt.kernels.launch import cdiv, next_power_of_2, target

# Elements that a thread holds of each tensor: two 16-byte loads of a 16-bit dtype, and few enough registers for five tensors.
PER_THREAD = 16
# Registers of a thread: what a program of 16 warps may have. Left alone, ptxas spills two or five values to get down to 64
# or 72, for occupancy that these kernels do not need: 512 threads with three loads of 32 bytes under way each keep a
# processor's share of the memory busy.
REGISTERS = 128
# A tile has at least the elements of so many threads: several rows where rows are short.
THREADS = 128
MOST_WARPS = 16
# The tile of a kernel that adds up columns.
SUM_ROWS, SUM_WIDTH = 16, 128


@dataclass(frozen=True)
class Tile:
    """A tile of a row-wise kernel.

    Attributes:
        rows, width: its shape, powers of two. warps: for the program that works on it.
        whole: whether a row fits; otherwise rows is 1 and the kernel loops over the columns.
    """

    rows: int
    width: int
    warps: int
    whole: bool

    @property
    def meta(self) -> dict[str, int]:
        """The constants that every kernel takes."""
        registers = {"maxnreg": REGISTERS} if target().backend == "cuda" else {}
        return {"ROWS": self.rows, "WIDTH": self.width, "num_warps": self.warps, **registers}


def row_tile(width: int, widest: int, per_thread: int = PER_THREAD) -> Tile:
    """The tile for rows of `width` columns, of which up to `widest` (a power of two) may be held in registers at once."""
    if width % 16:  # rows that start anywhere are read element by element, and each address takes registers
        widest //= 2
    columns, least = next_power_of_2(width), THREADS * per_thread
    whole = columns <= widest
    columns = columns if whole else min(widest, least)
    rows = max(1, least // columns) if whole else 1
    return Tile(rows, columns, max(1, min(MOST_WARPS, rows * columns // (per_thread * target().warp))), whole)


def programs_over(groups: int, warps: int) -> int:
    """How many programs share `groups` tiles when each keeps a partial sum of a row: all processors are busy, and a partial
    sum stands for four tiles or more, so that writing and adding the partial sums costs little beside reading the tiles."""
    resident = target().processors * max(1, MOST_WARPS // warps)
    return max(1, min(resident, cdiv(groups, 4)))


def rows_per_sum(rows: int, width: int) -> int:
    """How many rows a program adds up that takes `SUM_WIDTH` columns of each: a multiple of `SUM_ROWS`."""
    across = max(1, cdiv(width, SUM_WIDTH))
    programs = programs_over(cdiv(rows, SUM_ROWS) * across, 4)
    return max(1, cdiv(cdiv(rows, max(1, programs // across)), SUM_ROWS)) * SUM_ROWS


def strided_rows(x: torch.Tensor) -> torch.Tensor:
    """[..., d] as [rows, d], copied only where rows are no regular steps or a row's elements are apart (a transpose)."""
    rows = as_rows(x)
    return rows if rows.stride(1) in (0, 1) or rows.shape[1] < 2 else rows.contiguous()
