"""Write a model that was made from a checkpoint as an ordinary checkpoint."""

import json
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from hifiprune.config.groups import AUTO, DECI, REMOTE, STOCK
from hifiprune.io.quiet_libraries import quiet
from hifiprune.models.checkpoint import GENERATION, Checkpoint
from hifiprune.models.companion_files import copy_companions
from hifiprune.models.config_file import CONFIG, config_text, with_rope_theta
from hifiprune.models.edit import state_widths
from hifiprune.models.layouts import copy_code, in_layout, settled_layout, zero_biases
from hifiprune.models.mlp import find_mlps
from hifiprune.models.modeling_pruned import MixedWidths


def save_model(
    model: PreTrainedModel,
    source: Checkpoint,
    folder: Path,
    shard_size: str = "5GB",
    *,
    layout: str = AUTO,
    **options: Any,
) -> None:
    """Write `model`, made from the checkpoint `source`, into a new `folder`, with the source's tokenizer and licence.

    Options go to the model's `save_pretrained`.

    Raises:
        UserError: the layout cannot hold the model's widths.
    """
    widths = [mlp.neurons for mlp in find_mlps(model)]
    layout = settled_layout(layout, model.config, widths)
    if layout in (STOCK, REMOTE) and isinstance(model, MixedWidths) != (layout == REMOTE):
        state_widths(model, widths, mixed=layout == REMOTE)
    if layout == DECI and (zeros := zero_biases(model)):
        options = {"state_dict": {**model.state_dict(), **zeros}} | options
    if not source.gguf:
        model.generation_config = GenerationConfig()  # which transformers may refuse; the source's file is copied
    with quiet():
        model.save_pretrained(folder, max_shard_size=shard_size, **options)
    saved = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if source.gguf:
        facts = in_layout(with_rope_theta(saved), model, layout)
        text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
        source.tokenizer().save_pretrained(folder)
    else:
        text = config_text((source.folder / CONFIG).read_bytes().decode(), source.config(), model, saved, layout)
    (folder / CONFIG).write_bytes(text.encode())
    if layout == DECI:
        copy_code(folder)
    if not source.gguf:
        (folder / GENERATION).unlink(missing_ok=True)
        copy_companions(source.folder, folder)
