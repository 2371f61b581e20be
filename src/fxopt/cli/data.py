"""`fxopt data`: what a model will be shown of a file, and which tokens it learns."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from typing import Any

from fxopt.cli.models import UsageError


def add(commands: Any) -> None:
    """The command's arguments."""
    command = commands.add_parser("data", help="show the rows of a file as tokens, the supervised ones marked, with counts",
                                  description="Read all rows of a file as training would, and show some with their supervised tokens marked.")
    command.add_argument("file", help="rows: .jsonl, .json, .csv, .tsv, .parquet, .txt")
    command.add_argument("--tokenizer", required=True, help="a Hugging Face folder, or a tokenizer.json or sentencepiece model")
    command.add_argument("--format", help="text, messages, prompt_completion, alpaca or sharegpt; otherwise the one that the rows fit")
    command.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="what the file calls a column")
    command.add_argument("--template", help="a chat template: a file, or chatml, llama3, gemma, alpaca; otherwise the tokenizer's")
    command.add_argument("--template-arguments", metavar="JSON", help="variables of the template, such as '{\"enable_thinking\": false}'")
    command.add_argument("--train-on", help="assistant, completion, turns or all")
    command.add_argument("--length", type=int, help="tokens of a sample at most")
    command.add_argument("--long", default="cut", help="what happens to longer ones: cut, drop or split")
    command.add_argument("--rows", type=int, default=3, help="samples to show (the first ones and the longest)")
    command.add_argument("--json", action="store_true", help="the same as JSON")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> str:
    from fxopt.data import Dataset, preview

    columns = dict(_pair(column) for column in arguments.columns)
    dataset = Dataset(arguments.file, arguments.tokenizer, format=arguments.format, columns=columns, length=arguments.length, long=arguments.long, train_on=arguments.train_on,
                      template=arguments.template, template_arguments=_object(arguments.template_arguments))
    if arguments.json:
        return json.dumps(preview.data(dataset, arguments.rows), indent=1, ensure_ascii=False) + "\n"
    return preview.text(dataset, arguments.rows, colour=sys.stdout.isatty(), width=shutil.get_terminal_size().columns)


def _pair(column: str) -> tuple[str, str]:
    ours, equals, theirs = column.partition("=")
    if not equals:
        raise UsageError(f"{column!r} names no column", where="--columns", do="write ours=theirs, such as instruction=question")
    return ours, theirs


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise UsageError(f"{text!r} is no JSON: {error.msg}", where="--template-arguments") from error
    if not isinstance(found, dict):
        raise UsageError(f"{text!r} is no JSON object", where="--template-arguments")
    return found
