"""Read checkpoints: local folders, hub ids and GGUF files.

Weights are read from safetensors or GGUF only: no file is ever unpickled, and no code from a checkpoint runs.
"""

import re
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hifiprune.config.groups import STOCK
from hifiprune.errors import UserError
from hifiprune.io.hub import at_revision, download
from hifiprune.io.json_files import check_objects
from hifiprune.io.quiet_libraries import quiet
from hifiprune.io.safetensors_stream import Stacked, Stored
from hifiprune.models.companion_files import has_vocabulary
from hifiprune.models.config_checks import check_sizes, configuration_explained, read_configuration
from hifiprune.models.detect import family_of, stock_class
from hifiprune.models.families import known_family
from hifiprune.models.layouts import layout_of, plain_facts
from hifiprune.models.library_errors import explained
from hifiprune.models.modeling_pruned import pruned_class
from hifiprune.models.tokenizer_files import read_tokenizer
from hifiprune.models.unsupported import refuse_kernels, refuse_quantized
from hifiprune.models.weight_files import (
    Tensors,
    check_tensors,
    check_whole,
    listed_files,
    model_tensors,
    refuse_missing,
    refuse_pointers,
    tied_once,
    untie_,
    untied_names,
)

GENERATION = "generation_config.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been found but not loaded.

    Attributes:
        name: name given by the user.
        folder: folder of its files.
        gguf: name of its GGUF file in the folder, if it is one.
        on_hub: whether its weights are still to be downloaded from the hub, where it is called `name`, at a revision
            if that names one.
    """

    name: str
    folder: Path
    gguf: str | None = None
    on_hub: bool = False

    @property
    def path(self) -> Path:
        """Return the file or folder that is read."""
        return self.folder / self.gguf if self.gguf else self.folder

    @property
    def commit(self) -> str | None:
        """Return the commit of its files, if they are from the hub."""
        return self.folder.name if self.on_hub and re.fullmatch("[0-9a-f]{40}", self.folder.name) else None

    @property
    def exact_name(self) -> str:
        """Return the name with the commit, which leads to these very files although the hub may get others."""
        return at_revision(self.name, self.commit)

    @property
    def weight_files(self) -> list[Path]:
        """Return the weight files, whether they exist or not.

        Raises:
            UserError: the weights are in another format, or their index is damaged.
        """
        if self.gguf:
            return [self.path]
        return listed_files(self.name, self.folder)

    @property
    def weight_bytes(self) -> int:
        """Return the size of the weight files on this disk, in bytes."""
        return sum(file.stat().st_size for file in self.weight_files if file.is_file())

    @property
    def is_here(self) -> bool:
        """Return whether all weights are on this disk."""
        return all(file.is_file() for file in self.weight_files)

    def config(self) -> PretrainedConfig:
        """Return a new copy of the model's configuration.

        Raises:
            UserError: it is missing or broken, of an unsupported family, or says that the weights are quantized.
        """
        return deepcopy(self._config)

    @cached_property
    def _config(self) -> PretrainedConfig:
        facts = None if self.gguf else self.stated
        if facts:  # before transformers refuses what it does not know or has no library for
            if facts.get("model_type") not in CONFIG_MAPPING:
                known_family(facts.get("model_type", "none"), facts.get("architectures"))
            refuse_quantized(self.name, self.folder, facts)
            refuse_kernels(self.name, facts)
            self._check_generation()
        with configuration_explained(self.name, facts, lambda facts: _configured(facts)):
            if self.layout == STOCK:
                config: PretrainedConfig = AutoConfig.from_pretrained(
                    self.folder, gguf_file=self.gguf, trust_remote_code=False
                )
            else:
                config = _configured(self.stated)
                config.name_or_path = str(self.folder)
            check_sizes(self.name, config)
            family_of(config)
        if getattr(config, "quantization_config", None) is not None:  # a GGUF file's, whose weights are dequantized
            del config.quantization_config
        return config

    def _check_generation(self) -> None:
        check_objects(self.folder, GENERATION)
        if (self.folder / GENERATION).is_file():
            with explained(self.name, GENERATION), quiet():
                GenerationConfig.from_pretrained(self.folder, trust_remote_code=False)

    @cached_property
    def stated(self) -> dict[str, Any]:
        """Return the contents of `config.json`, as in the layout stock but for `mlp_widths`; not for a GGUF file.

        Raises:
            UserError: it cannot be read, or states something of a wrong type or size.
        """
        return plain_facts(self._written)

    @cached_property
    def _written(self) -> dict[str, Any]:
        return read_configuration(self.folder)

    @property
    def layout(self) -> str:
        """Return how its configuration states widths: `stock`, `deci` or `remote`."""
        return STOCK if self.gguf else layout_of(self._written)

    def dtype(self) -> torch.dtype:
        """Return the dtype of the stored weights; float32 for GGUF, whose blocks are dequantized."""
        if self.gguf:
            return torch.float32
        stated = self._config.dtype
        if isinstance(stated, torch.dtype):
            return stated
        if not self.is_here:
            self.fetch()
        self._check_files()
        with safe_open(self.weight_files[0], "pt") as file:
            tensor: torch.Tensor = file.get_tensor(next(iter(file.keys())))
        return tensor.dtype

    def fetch(self) -> None:
        """Have every weight file on this disk, from the hub if need be, and check by headers that a model can be made.

        Raises:
            UserError: a file cannot be had, is missing, truncated or damaged, or holds other tensors than the model's.
        """
        if self.on_hub:
            download(self.exact_name, [file.name for file in self.weight_files])
        if self.gguf:
            self._check_files()
        else:
            _ = self._stored

    def _check_files(self) -> None:
        files = self.weight_files
        for file in files:
            if not file.is_file():
                raise UserError(f"{self.name} lacks the weight file {file.name}, one of {len(files)}; copy it again")
        refuse_pointers(self.name, files)
        for file in files if not self.gguf else ():
            check_whole(self.name, file)

    def check_files(self) -> None:
        """Check as the loader would, but without reading weights, that the files are whole and fit together.

        Raises:
            UserError: the configuration or tokenizer cannot be read, or the weights are not the model's.
        """
        self.fetch()
        with explained(self.name, "the weights"), quiet():
            loaded: Any = self.model_class.from_pretrained(
                self.folder,
                config=self.config(),
                device_map="meta",
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        _, report = loaded
        refuse_missing(self.name, report["missing_keys"])
        if has_vocabulary(self.folder):
            self.tokenizer()

    def tensors(self) -> dict[str, Stored | Stacked]:
        """Return the stored tensors by the model's names, in the order of their bytes; tied tensors once."""
        return dict(self._stored[0])

    @cached_property
    def _stored(self) -> tuple[Tensors, frozenset[str]]:
        """Return the stored tensors, checked, and the parameters kept apart although the configuration ties them."""
        self._check_files()
        skeleton = self._as_configured()
        tensors = model_tensors(self.weight_files, family_of(self._config), skeleton)
        check_tensors(self.name, skeleton, tensors)
        apart = untied_names(skeleton, tensors, self.dtype())
        untie_(skeleton, apart)
        return tied_once(skeleton, tensors), apart

    def skeleton(self) -> PreTrainedModel:
        """Return the model on the meta device: all shapes, no weights. It is built once, so it must not be changed."""
        here = self.is_here  # once files are, they may keep apart what the configuration ties
        if here not in self._skeletons:
            self._skeletons[here] = self.new_skeleton()
        return self._skeletons[here]

    @cached_property
    def _skeletons(self) -> dict[bool, PreTrainedModel]:
        return {}

    def new_skeleton(self) -> PreTrainedModel:
        """Build the model on the meta device.

        Where files are here, what they keep apart is not tied, as in the loaded model.
        """
        model = self._as_configured()
        self.untie_as_stored_(model)
        return model

    def untie_as_stored_(self, model: PreTrainedModel) -> None:
        """Tie a model on the meta device as transformers ties the loaded one."""
        if not self.gguf and self.is_here:
            untie_(model, self._stored[1])

    def _as_configured(self) -> PreTrainedModel:
        facts = None if self.gguf else self.stated
        with configuration_explained(self.name, facts, lambda facts: self._skeleton_of(_configured(facts))):
            return self._skeleton_of(self.config())

    def _skeleton_of(self, config: PretrainedConfig) -> PreTrainedModel:
        with torch.device("meta"), no_init_weights():  # which ties them, too
            model: PreTrainedModel = self.model_class._from_config(config)
        model.tie_weights()
        return model

    def check_attention(self, attention: str) -> None:
        """Refuse an attention implementation that the model's class does not take.

        Raises:
            UserError: it does not.
        """
        try:
            with torch.device("meta"):
                self.model_class._from_config(self.config(), attn_implementation=attention)
        except (ValueError, ImportError) as error:
            said = str(error).partition(". ")[0]
            raise UserError(
                f"{self.name} does not run with attention '{attention}' ({said}); leave out --attention"
            ) from error

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """Return its stock class, or ours if its MLPs differ in width; never one from code of the checkpoint."""
        return pruned_class(stock_class(self._config), mixed=hasattr(self._config, "mlp_widths"))

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        return read_tokenizer(self.name, self.folder, self.gguf)

    def load(
        self, dtype: torch.dtype | None = None, device: str = "cpu", attention: str | None = None
    ) -> PreTrainedModel:
        """Load the weights, in the checkpoint's own dtype if none is given.

        Raises:
            UserError: a shard is missing or damaged, tensors are missing, or the attention is not available.
            RunError: not enough memory.
        """
        config = self.config()
        self.fetch()
        arguments: dict[str, Any] = {"config": config}
        if self.gguf:
            arguments = {"gguf_file": self.gguf}
            if gguf := getattr(transformers, "GgufConfig", None):  # without it, before 5.18, blocks are dequantized too
                arguments["quantization_config"] = gguf(dequantize=True)
        if family_of(config).experts and dtype == torch.float64:
            arguments["experts_implementation"] = "eager"  # the others do not know it
        with explained(self.name, "the weights"), quiet():
            loaded: Any = self.model_class.from_pretrained(
                self.folder,
                dtype=dtype or self.dtype(),
                attn_implementation=attention,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # which are refused below, by name
                **arguments,
            )
        model, report = loaded
        for tensor, found, wanted in sorted(report["mismatched_keys"]):
            sizes = f"{list(found)} in the files, where the configuration asks for {list(wanted)}"
            raise UserError(f"{self.name}: {tensor} is {sizes}; copy the checkpoint again")
        refuse_missing(self.name, report["missing_keys"])
        if self.gguf:
            model.hf_quantizer, model.is_quantized = None, False  # its weights are plain now: it can be saved
            model.config.__dict__.pop("quantization_config", None)
        with explained(self.name, "the weights"):
            placed: PreTrainedModel = model.to(device).eval()
        return placed


def _configured(facts: dict[str, Any]) -> PretrainedConfig:
    """Return the configuration that these facts make, after checking that all of it can be used."""
    config: PretrainedConfig = CONFIG_MAPPING[facts["model_type"]].from_dict(facts)
    check_sizes("config.json", config)
    return config
