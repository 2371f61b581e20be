"""Loaders of text data sets: padded batches of similar lengths, or packed rows."""

from __future__ import annotations

from fxopt.data.dataset import Dataset, Part
from fxopt.errors import DataError
from fxopt.train.loader import Loader, packed_row


def text_loader(dataset: Dataset | Part, batch_size: int | None = None, *, tokens: int | None = None, train: bool = True, workers: int = 0, seed: int = 0) -> Loader:
    """Batches of a text data set.

    Args:
        batch_size: samples of a padded batch. tokens: instead, a batch is one row [1, up to tokens] of whole samples without padding, with
            `position_ids` that start at 0 in each; the model must keep them apart by these (models of Transformers do, and the `pack` pass).
        train: samples of similar length together, shuffled; otherwise in the order of the file. workers, seed: see `Loader`.

    Raises:
        DataError: neither or both of `batch_size` and `tokens`; a sample that is longer than `tokens`.
    """
    if (batch_size is None) == (tokens is None):
        raise DataError("Give either a batch size, or the tokens of a packed row.", where="text_loader", do="Set `trainer.batch_size`, or `data.packing`.")
    if tokens is not None:
        return Loader(dataset, lengths=dataset.lengths, tokens=tokens, collate=packed_row, workers=workers, seed=seed)
    return Loader(dataset, batch_size or 1, lengths=dataset.lengths if train else None, collate=dataset.collate, workers=workers, seed=seed)
