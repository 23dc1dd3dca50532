"""Reading and writing checkpoints: local folders, hub ids and GGUF files in; ordinary safetensors folders out.

Weights are read from safetensors or GGUF only: no user's file is ever unpickled, and no code from a checkpoint runs.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.errors import RunError, UserError
from hifiprune.neurons import family_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
LIBRARY_ERRORS = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, AttributeError, SafetensorError,
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this disk that has been found but not loaded.

    Attributes:
        name: what the user called it.
        folder: where its files are.
        gguf: name of its GGUF file in the folder, if it is one.
    """

    name: str
    folder: Path
    gguf: str | None = None

    @property
    def path(self) -> Path:
        """The file or folder that is read."""
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files."""
        pattern = self.gguf or "*.safetensors"
        return sum(file.stat().st_size for file in self.folder.glob(pattern))

    def config(self) -> PretrainedConfig:
        """The model's configuration.

        Raises:
            UserError: it is missing or broken, of an unsupported family, or says that the weights are quantized.
        """
        with _explained(self.name, "the configuration"):
            if not self.gguf:  # before transformers refuses a type that it does not know
                facts = json.loads((self.folder / "config.json").read_text())
                family_of(facts.get("model_type", "none"), facts.get("architectures"))
            config: PretrainedConfig = AutoConfig.from_pretrained(self.folder, gguf_file=self.gguf)
        family_of(config.model_type, config.architectures)
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None and not self.gguf:
            facts = quantization if isinstance(quantization, dict) else quantization.to_dict()
            raise UserError(
                f"{self.name} is quantized ({facts.get('quant_method', 'unknown method')}) and cannot be cut; "
                "prune the original checkpoint and quantize the result"
            )
        if quantization is not None:
            del config.quantization_config
        return config

    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights; float32 for GGUF, whose blocks are dequantized."""
        if self.gguf:
            return torch.float32
        stated = self.config().dtype
        return stated if isinstance(stated, torch.dtype) else _stored_dtype(self.folder)

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device: all shapes, no weights."""
        config = self.config()
        with _explained(self.name, "the configuration"), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            UserError: there is none.
        """
        if not self.gguf and not _has_tokenizer(self.folder):
            raise UserError(f"{self.name} has no tokenizer files; copy those of the original model to {self.folder}")
        with _explained(self.name, "the tokenizer"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder, gguf_file=self.gguf)
        return tokenizer

    def load(
        self, dtype: torch.dtype | None = None, device: str = "cpu", attention: str | None = None
    ) -> PreTrainedModel:
        """Load the weights, in the checkpoint's own dtype if none is given.

        Raises:
            UserError: a shard is missing or damaged, tensors are missing, or the attention is not available.
            RunError: not enough memory.
        """
        config = self.config()
        if not self.gguf:
            verify_shards(self.name, self.folder)
        arguments: dict[str, Any] = {"gguf_file": self.gguf} if self.gguf else {"config": config}
        with _explained(self.name, "the weights"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype or self.dtype(),
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                **arguments,
            )
        model, report = loaded
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise UserError(f"{self.name} lacks {len(missing)} tensors, such as {missing[0]}; copy it again")
        if self.gguf:
            model.hf_quantizer, model.is_quantized = None, False
            del model.config.quantization_config
        with _explained(self.name, "the weights"):
            placed: PreTrainedModel = model.to(device).eval()
        return placed

    def save(self, model: PreTrainedModel, folder: Path, shard_size: str = "5GB") -> None:
        """Write `model`, made from this checkpoint, into a new `folder`, with this one's tokenizer and licence."""
        if (self.folder / "generation_config.json").is_file():
            # Copied below as it is: transformers refuses to save settings that many models ship with.
            model.generation_config = GenerationConfig()
        model.save_pretrained(folder, max_shard_size=shard_size)
        if self.gguf:
            self.tokenizer().save_pretrained(folder)
            return
        for pattern in COMPANIONS:
            for file in self.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)


def find_checkpoint(name: str) -> Checkpoint:
    """Find a model by local folder, GGUF file or hub id; a hub id is downloaded to the hub's cache.

    Raises:
        UserError: there is no such model, or it has no safetensors weights.
    """
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise UserError(f"{name} is neither a model folder, a .gguf file nor a hub id")
        return Checkpoint(name, path.parent, path.name)
    if path.is_dir():
        folder = path
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        folder = _download(name)
    else:
        raise UserError(f"there is no model folder or .gguf file {name}")
    if not (folder / "config.json").is_file():
        found = sorted(file.name for file in folder.iterdir())[:5]
        raise UserError(f"{name} holds no config.json (found: {', '.join(found) or 'nothing'}); is it a model folder?")
    return Checkpoint(name, folder)


def verify_shards(name: str, folder: Path) -> None:
    """Check, reading headers only, that every safetensors shard is there and whole.

    Raises:
        UserError: a shard is missing, truncated or damaged, or the weights are in another format.
    """
    if (folder / INDEX).is_file():
        try:
            shards = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{name}: {INDEX} is damaged ({error}); copy the checkpoint again") from error
    elif (folder / SINGLE).is_file():
        shards = [SINGLE]
    else:
        other = sorted(file.name for file in folder.glob("*.bin")) or sorted(file.name for file in folder.glob("*.pt*"))
        hint = f"; {other[0]} would have to be unpickled: convert it to safetensors first" if other else ""
        raise UserError(f"{name} has no {SINGLE} and no {INDEX}{hint}")
    for shard in shards:
        if not (folder / shard).is_file():
            raise UserError(f"{name} lacks the weight file {shard}, one of {len(shards)}; copy the checkpoint again")
        try:
            with safe_open(folder / shard, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{name}: {shard} is truncated or damaged ({error}); copy the checkpoint again") from error


def _stored_dtype(folder: Path) -> torch.dtype:
    """Dtype of the first tensor of the first shard."""
    with safe_open(min(folder.glob("*.safetensors")), "pt") as file:
        tensor: torch.Tensor = file.get_tensor(next(iter(file.keys())))
    return tensor.dtype


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json"))


def _download(name: str) -> Path:
    patterns = ["*.safetensors", "config.json", INDEX, *COMPANIONS]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HfHubHTTPError as error:
        answer = error.server_message or error
        raise UserError(f"there is no folder {name} here, and the hub answered: {answer}") from error
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise UserError(
            f"there is no folder {name} here, and the model hub could not be reached to look for it there; "
            "check the spelling, or download the model first and give its folder"
        ) from error


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turn a library's error about a user's file into one line."""
    try:
        yield
    except UserError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise RunError(f"not enough memory for {what} of {name}; try --dtype bfloat16") from error
    except LIBRARY_ERRORS as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{what} of {name} cannot be read: {first}") from error
