"""hoist: what no training changes is computed once for each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.errors import PassError
from fxopt.ir.edit import Edit
from fxopt.ir.facts import Hoist as Fact
from fxopt.ir.hoist import frozen, product
from fxopt.passes.base import Pass, Promise


@dataclass(frozen=True)
class Hoist(Pass):
    """what depends on no trainable tensor is computed once for each sample, and kept

    Frozen layers in front of the first trained one (embeddings, a vision tower, lower blocks when adapters target the upper ones) give the
    same values in every epoch. With this pass they are kept for each sample, under a hash of the bytes and sizes of its inputs, and looked up when
    the sample comes again, whatever batch it is in. Whole regions are left out (`runtime/hoisting.py`), so what is kept is what leaves the
    last of them.

    Only where it is proven, operator by operator, that samples do not meet (`ir/samples.py`); where nothing random is drawn and nothing written; and
    while the frozen weights stay what they are: a change of them is seen by their versions, said aloud, and drops what was kept. Values are
    equal to the bit where the device's kernels give a sample the same bits in any batch, else up to the order of sums.

    Args:
        limit: bytes that may be kept; the samples that were not used for longest go first.
        folder: where to keep them on disk, for other runs too; none: in memory.
    """

    limit: int = 4 << 30
    folder: str | None = None

    name: ClassVar[str] = "hoist"
    promise: ClassVar[Promise] = Promise(values="same")

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise PassError(f"hoist: the limit must be above 0, got {self.limit}", do="write hoist(limit=4GiB)")

    def run(self, edit: Edit) -> None:
        """Leaves the graph alone: the fact decides what the runtime keeps."""
        edit.facts -= {fact for fact in edit.facts if isinstance(fact, Fact)}
        edit.facts.add(Fact(self.limit, self.folder))
        same = frozen(edit.source)
        products = [node for node in edit.source.graph.nodes if product(node)]
        edit.note(f"{sum(node in same for node in products)} of {len(products)} products and attentions depend on no trainable tensor; the report says "
                  "which regions are left out, and how often")
