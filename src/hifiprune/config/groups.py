"""Options that several commands share: budget, calibration data, criterion, allocation, compute."""

import re
from dataclasses import dataclass, replace
from functools import partial

from hifiprune.bounds import COUNT, FEW, INNER_SHARE, PAIR, POSITIVE, SEED, SHARE
from hifiprune.config.options import (
    CALIBRATION,
    COMPUTE,
    OUTPUT,
    SCORING,
    TEXT,
    WIDTHS,
    Checked,
    option,
)
from hifiprune.errors import UserError
from hifiprune.io.text_sources import SELF, check_named

SAMPLERS = ("auto", "documents", "stream")
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")
ALLOCATIONS = ("uniform", "global")
MOST_TOKENS = 2**32
"""Largest number of tokens of all windows; papers use some hundred thousand."""
SDMPRUNE_SETTINGS = {0.2: (0.4, 0.2), 0.3: (0.42, 0.5), 0.4: (0.1, 0.2)}
"""Alpha and temperature of self-distillation that arXiv 2506.11120 uses at each ratio."""
BY_RATIO = "the paper's for the nearest ratio"

overwrite_option = partial(option, False, "Replace an existing output.", panel=OUTPUT)
dry_run_option = partial(option, False, "Estimate time, memory and disk usage, then stop.", panel=OUTPUT)
until_stable_option = partial(
    option,
    None,
    "Stop scoring early once the estimated overlap with the neurons that all windows would keep reaches this value, "
    "such as 0.99.",
    panel=SCORING,
    bounds=INNER_SHARE,
)


@dataclass(frozen=True)
class Budget(Checked):
    """How much to remove; exactly one of the three.

    Attributes:
        ratio: fraction of the model's total parameters, in (0, 1).
        neuron_ratio: fraction of the MLP neurons, in (0, 1).
        width: neurons that every MLP keeps.

    Raises:
        UserError: none or several are given, or a value is out of range.
    """

    ratio: float | None = option(None, "Fraction of all parameters to remove, such as 0.2.", bounds=INNER_SHARE)
    neuron_ratio: float | None = option(
        None, "Fraction of the MLP neurons to remove, in place of --ratio.", panel=WIDTHS, bounds=INNER_SHARE
    )
    width: int | None = option(None, "Neurons that every MLP keeps, in place of --ratio.", panel=WIDTHS, bounds=COUNT)

    def __post_init__(self) -> None:
        """Check that there is one, and its value."""
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) != 1:
            flags = "--ratio, --neuron-ratio, --width"
            raise UserError(f"give exactly one of {flags}; given: {', '.join(given) or 'none'}")
        super().__post_init__()

    def __str__(self) -> str:
        name, value = next((name, value) for name, value in vars(self).items() if value is not None)
        return f"{name.replace('_', '-')} {value:g}"


def mixture(words: list[str]) -> dict[str, object]:
    """Return the first source, and the others with their shares: of `a` and `b:0.3`, `a` and `(("b", 0.3),)`.

    Sources without a share get equal parts of the rest; where all have one, their shares are relative.

    Raises:
        UserError: the shares leave nothing for a source.
    """
    matches = [re.fullmatch(r"(.+):(\d*\.?\d+)", word) for word in words]
    sources = [match[1] if match else word for word, match in zip(words, matches, strict=True)]
    given = [float(match[2]) if match else None for match in matches]
    total = sum(share for share in given if share is not None)
    if None not in given and total > 0:
        shares = [share / total for share in given if share is not None]
    elif total < 1:
        shares = [(1 - total) / given.count(None) if share is None else share for share in given]
    else:
        raise UserError(f"the shares of --calibration add up to {total:g} and leave nothing for the others")
    return {"source": sources[0], "mixed": tuple(zip(sources[1:], shares[1:], strict=True))}


@dataclass(frozen=True)
class Calibration(Checked):
    """Which text the model is shown, and how windows are drawn from it.

    Attributes:
        source: a `.jsonl`, `.csv`, `.tsv` or `.parquet` file, any other file as plain text, one of these as `.gz`,
            `.bz2`, `.xz` or `.zst`, a folder of `.txt` and those, a pipe (`-` is standard input), `python-docs` (the
            language reference that ships inside Python), `self` (text sampled from the model) or a hub data set,
            `id[:config][:split]`.
        num_samples: number of windows.
        seq_len: tokens per window.
        seed: of the choice of documents and windows.
        sampler: `documents` draws one random window from each of `num_samples` random documents longer than `seq_len`
            (the papers' way), `stream` joins all documents by the end-of-text token, cuts windows and draws from these;
            `auto` is `stream` for a single document, else `documents`.
        text_column: column of the text in JSON Lines, Parquet and hub data, guessed if not given.
        mixed: further sources, and the share of the windows that each gets; `source` gets the rest.
        bos: begin every window with what the tokenizer writes before a text, such as a start token, where it does. A
            window of `seq_len` tokens has that many fewer of text. The papers' windows are without.

    Raises:
        UserError: a value is out of range.
    """

    source: str = option(
        help="Calibration text: a .txt, .jsonl, .csv or .parquet file (also .gz, .bz2, .xz, .zst), a folder of these, "
        "'-' for standard input, a hub data set id[:config][:split], 'python-docs' (ships with Python) or 'self' "
        "(sampled from the model). Repeat it to mix sources; SOURCE:0.3 gets 30% of the windows.",
        flag="--calibration",
        metavar="SOURCE",
        words=mixture,
    )
    num_samples: int = option(128, "Number of calibration windows.", panel=CALIBRATION, bounds=COUNT)
    seq_len: int = option(1024, "Tokens per window.", panel=CALIBRATION, bounds=PAIR)
    seed: int = option(0, "Seed of everything that is drawn at random.", panel=CALIBRATION, bounds=SEED)
    sampler: str = option(
        "auto",
        "documents: a random window of each long document; stream: windows of all documents joined; auto: stream for "
        "a single document.",
        panel=CALIBRATION,
        choices=SAMPLERS,
    )
    text_column: str | None = option(
        None, "Column that holds the text.", panel=CALIBRATION, shown_default="guessed from the data"
    )
    mixed: tuple[tuple[str, float], ...] = option((), "Further sources with their shares.", in_files_only=True)
    bos: bool = option(True, "Begin every window with the tokenizer's start token.", in_files_only=True)

    def __post_init__(self) -> None:
        """Check the sizes, the names of sources and their shares."""
        super().__post_init__()
        if self.num_samples * self.seq_len > MOST_TOKENS:
            raise UserError(
                f"num-samples {self.num_samples} of seq-len {self.seq_len} are {self.num_samples * self.seq_len:.3g} "
                f"tokens, more than the {MOST_TOKENS:.3g} that are taken; use fewer"
            )
        for source in self._sources:
            check_named(source)
        if self.mixed and SELF in self._sources:
            raise UserError(f"'{SELF}' cannot be mixed with other sources")
        for source, share in self.mixed:
            if not 0 < share < 1:
                raise UserError(f"the share {share:g} of {source} must lie in (0, 1)")
        if min(self._counts) < 1:
            raise UserError(
                f"num-samples {self.num_samples} leaves a source without a window; use more or larger shares"
            )

    @property
    def is_sampled(self) -> bool:
        """Return whether the text is sampled from the model itself."""
        return self.source == SELF

    @property
    def _sources(self) -> list[str]:
        """Return all sources."""
        return [self.source, *(source for source, _ in self.mixed)]

    @property
    def _counts(self) -> list[int]:
        """Return the number of windows of each source."""
        further = [round(share * self.num_samples) for _, share in self.mixed]
        return [self.num_samples - sum(further), *further]

    @property
    def parts(self) -> list["Calibration"]:
        """Return the calibration of each source by itself, with its number of windows."""
        return [
            replace(self, source=source, num_samples=count, mixed=())
            for source, count in zip(self._sources, self._counts, strict=True)
        ]


@dataclass(frozen=True)
class Text(Checked):
    """A held-out text to evaluate on.

    Attributes:
        source: any calibration source except `self`.
        seq_len: tokens per window.
        max_windows: maximum number of windows, from the start of the text.
        fidelity: measure every metric; otherwise only perplexity and entropy, in less time.
        text_column: column of the text, guessed if not given.

    Raises:
        UserError: a number is out of range.
    """

    source: str = option(
        help="Held-out text to measure on: any source that --calibration takes but 'self'.",
        flag="--text",
        metavar="SOURCE",
    )
    seq_len: int = option(1024, "Tokens per window.", panel=TEXT, bounds=PAIR)
    max_windows: int | None = option(
        None, "Measure on the first windows only.", panel=TEXT, bounds=COUNT, shown_default="all"
    )
    fidelity: bool = option(True, "Measure every metric, not only perplexity and entropy.", in_files_only=True)
    text_column: str | None = option(
        None, "Column that holds the text.", panel=TEXT, shown_default="guessed from the data"
    )

    def __post_init__(self) -> None:
        """Check the numbers and the name of the source."""
        check_named(self.source)
        super().__post_init__()


@dataclass(frozen=True)
class CriterionOptions(Checked):
    """Options of the criteria; each criterion uses those that it knows.

    Attributes:
        alpha: share of the divergence from the dense model in self-distillation, in [0, 1]; None is the papers'.
        temperature: of the dense model in self-distillation; None is the papers'.
        light_cut: fraction of the neurons that self-distillation removes before it looks.
        label_samples: labels that `fisher` draws at each position, one backward pass each.
        seed: of everything drawn at random.

    Raises:
        UserError: a value is out of range.
    """

    alpha: float | None = option(
        None,
        "Self-distillation: share of the divergence from the dense model in the objective.",
        panel=SCORING,
        bounds=SHARE,
        shown_default=BY_RATIO,
    )
    temperature: float | None = option(
        None,
        "Self-distillation: temperature of the dense model.",
        panel=SCORING,
        bounds=POSITIVE,
        shown_default=BY_RATIO,
    )
    light_cut: float = option(
        0.025,
        "Self-distillation: fraction of the neurons that its first stage removes.",
        panel=SCORING,
        bounds=INNER_SHARE,
    )
    label_samples: int = option(
        1,
        "Criteria fisher and fisher-abs: labels drawn from the model at each position, one backward pass each.",
        panel=SCORING,
        bounds=FEW,
    )
    seed: int = option(0, "Seed of everything that is drawn at random.", panel=CALIBRATION, bounds=SEED)

    def for_ratio(self, ratio: float) -> "CriterionOptions":
        """Return the same with the papers' alpha and temperature at their nearest ratio, where these are left open."""
        alpha, temperature = SDMPRUNE_SETTINGS[min(SDMPRUNE_SETTINGS, key=lambda paper: abs(paper - ratio))]
        return replace(
            self,
            alpha=alpha if self.alpha is None else self.alpha,
            temperature=temperature if self.temperature is None else self.temperature,
        )


@dataclass(frozen=True)
class AllocationConfig(Checked):
    """How MLPs share the neurons that a budget leaves.

    Attributes:
        method: `uniform`, the same number in every MLP, which a stock configuration can state; or `global`, one
            threshold over all MLPs, for scores that are on one scale.
        floor: fraction of the uniform width that every MLP keeps where widths differ, in [0, 1].

    Raises:
        UserError: the allocation is not known, or a value is out of range.
    """

    method: str = option(
        "uniform",
        "uniform: one width for all layers; global: one threshold on the scores of all layers (by 'fisher' unless "
        "--criterion is given), so that the checkpoint loads with trust_remote_code=True.",
        flag="--allocation",
        choices=ALLOCATIONS,
    )
    floor: float = option(
        0.75,
        "Fraction of the uniform width that every layer keeps where widths differ.",
        panel=WIDTHS,
        bounds=SHARE,
    )


@dataclass(frozen=True)
class ComputeConfig(Checked):
    """How to run the model.

    Attributes:
        device: `auto` (CUDA if there is one, else the CPU), `cpu`, `cuda` or `cuda:N`.
        dtype: `auto` (float32 on a CPU, the checkpoint's own on a GPU) or a floating dtype by name; the output
            keeps the checkpoint's own dtype in any case.
        batch_size: windows per step.
        recompute: trade time for memory; None decides by free memory.
        attention: transformers' name of an attention implementation, such as `flash_attention_2`; None is the default.
        stream: leave the weights on the disk and read each block's when it runs; None decides by free memory.
        scratch: folder in which a streamed model's activations are set aside, if not in memory.

    Raises:
        UserError: a value is out of range, or is no device.
    """

    device: str = option("auto", "auto, cpu, cuda or cuda:N.", panel=COMPUTE)
    dtype: str = option(
        "auto",
        "Arithmetic: float32, bfloat16, float16, or auto: float32 on a CPU, the model's own on a GPU.",
        panel=COMPUTE,
        choices=("auto", *DTYPE_NAMES),
    )
    batch_size: int = option(1, "Windows per step; results do not depend on it.", panel=COMPUTE, bounds=COUNT)
    recompute: bool | None = option(
        None,
        "Recompute activations on the way back, or keep them: time for memory.",
        panel=COMPUTE,
        flag="--recompute/--keep-graphs",
        shown_default="by free memory",
    )
    attention: str | None = option(
        None, "Attention implementation, such as flash_attention_2.", panel=COMPUTE, shown_default="the model's own"
    )
    stream: bool | None = option(
        None,
        "Stream the weights of one block at a time from the disk, or load them all.",
        panel=COMPUTE,
        flag="--stream/--in-memory",
        shown_default="by free memory",
    )
    scratch: str | None = option(
        None,
        "Folder on a fast disk for the activations of a streamed model.",
        panel=COMPUTE,
        metavar="DIR",
        shown_default="kept in memory",
    )

    def __post_init__(self) -> None:
        """Check what can be checked without torch; the rest is checked where the device is used."""
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,4})?", self.device):
            raise UserError(f"device '{self.device}' is not known; use auto, cpu, cuda or cuda:0")
