"""Text for training: rows of files in known formats, chat templates, tokenizers, and which tokens are learned from.

The public names are `Dataset` and `load_tokenizer`.
"""

from fxopt.data.dataset import Dataset
from fxopt.data.tokenizer import load_tokenizer

__all__ = ["Dataset", "load_tokenizer"]
