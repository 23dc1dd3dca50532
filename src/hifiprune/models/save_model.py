"""Write a model that was made from a checkpoint as an ordinary checkpoint."""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hifiprune.io.quiet_libraries import quiet
from hifiprune.models.checkpoint import GENERATION, Checkpoint
from hifiprune.models.companion_files import copy_companions
from hifiprune.models.config_file import CONFIG, config_text, with_rope_theta


def save_model(
    model: PreTrainedModel, source: Checkpoint, folder: Path, shard_size: str = "5GB", **options: Any
) -> None:
    """Write `model`, made from the checkpoint `source`, into a new `folder`, with the source's tokenizer and licence.

    Options go to the model's `save_pretrained`.
    """
    if not source.gguf:
        model.generation_config = GenerationConfig()  # which transformers may refuse; the source's file is copied
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard_size, **options)
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if source.gguf:
        text = json.dumps(with_rope_theta(saved), indent=2, sort_keys=True) + "\n"
        source.tokenizer().save_pretrained(folder)
    else:
        text = config_text((source.folder / CONFIG).read_bytes().decode(), source.config(), model, saved)
    (folder / CONFIG).write_bytes(text.encode())
    if not source.gguf:
        (folder / GENERATION).unlink(missing_ok=True)
        copy_companions(source.folder, folder)
