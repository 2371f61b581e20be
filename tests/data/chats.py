"""Conversations whose words say who wrote them, chat templates of real models, and small tokenizers."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from demo import assets
from fxopt.data.template import BUILT_IN
from fxopt.data.tokenizer import Tokenizer, load_tokenizer

NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
WORD = re.compile(r"[AQS]\d+")
_SPECIAL = re.compile(r"<\|[^|>'\"{} ]+\|>|<｜[^｜]+｜>|<[a-z_]*(?:turn|eos|end|im)[a-z_]*>|<turn\|>|\[\|endofturn\|\]|\[(?:eos|e~\[)[^\]]*\]?|\[e~\[")


@cache
def templates() -> dict[str, str]:
    """Chat templates by name: those of real models, and the classical ones."""
    return {**assets.chat_templates(), **BUILT_IN}


def special_of(source: str) -> list[str]:
    """The special tokens that a template writes, by their looks."""
    return sorted({*_SPECIAL.findall(source), *NAMED.values(), "<|im_start|>", "<|im_end|>"})


EXACT = ("chatml", "llama3", "gemma", "alpaca", "axolotl/mistral_v1", "trl/phi3_training")
"""Templates of which a test knows what each answer looks like."""


@cache
def transformers_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level tokenizer that has the special tokens of the templates of EXACT."""
    backend = Backend.from_file(str(assets.model_folder() / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in sorted({token for name in EXACT for token in special_of(templates()[name])})])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)


@cache
def tokenizer(name: str) -> Tokenizer:
    """The same as ours, with a template."""
    return replace(load_tokenizer(transformers_tokenizer()), sources={"default": templates()[name]})


def said(who: str, rng: random.Random) -> str:
    """Words of one speaker (A: assistant, Q: user, S: system or tool) among white space and characters of several bytes."""
    words = [f"{who}{rng.randrange(10**6)}" for _ in range(rng.randint(1, 4))]
    return "".join(word + rng.choice(["", " ", ", ", "\n", "\n\n", "é", " 🙂 ", "。", "!"]) for word in words[:-1]) + words[-1]


def conversation(rng: random.Random, system: bool, turns: int, tools: bool = False) -> list[dict[str, Any]]:
    """Questions and answers in turns; with `tools`, the last answer calls one first."""
    found: list[dict[str, Any]] = [{"role": "system", "content": said("S", rng)}] if system else []
    for turn in range(turns):
        found.append({"role": "user", "content": said("Q", rng)})
        if tools and turn == turns - 1:
            call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": said("A", rng), "n": rng.randrange(9)}}}
            found += [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "name": "look_up", "content": said("S", rng)}]
        found.append({"role": "assistant", "content": said("A", rng)})
    return found


TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "Looks a word up.", "parameters": {"type": "object", "properties": {"word": {"type": "string"}, "n": {"type": "integer"}}, "required": ["word"]}}}]
