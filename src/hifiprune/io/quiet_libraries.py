"""Libraries without their own progress bars and warnings, for as long as ours work with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from tqdm.auto import tqdm
from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from showing bars and warnings, and leave its settings as they were."""
    bars, hub_is_quiet, verbosity = (
        logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
        logging.get_verbosity(),
    )
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with patch.object(modeling_gguf_pytorch_utils, "tqdm", partial(tqdm, disable=True)):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # and the hub's
            if hub_is_quiet:
                disable_progress_bars()
