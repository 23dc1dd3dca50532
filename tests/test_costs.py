"""What a run is expected to cost follows from its trial by arithmetic, in every family; a dry run makes nothing."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig

import hifiprune as hp
from hifiprune.commands import cost_model, trial
from hifiprune.commands.cost_model import Estimator
from hifiprune.commands.trial import Pace
from hifiprune.config import CriterionOptions
from hifiprune.models.checkpoint import Checkpoint
from hifiprune.models.families import FAMILIES
from hifiprune.models.find_checkpoint import find_checkpoint
from hifiprune.models.mlp import find_blocks
from hifiprune.pruning.ridge import HeldOut, Moments
from tests.commands import refused, run
from tests.families import FORMS, ROUTED, VARIANTS, VOCABULARY, family_name, load, tiny_tokens
from tests.naive import mean_entropy, recorded_activations

REQUEST = [("hfprune", CriterionOptions())]
DISTINCT = ["llama", "falcon", "gpt2", "qwen2_moe"]
REST = sorted({*FORMS, *ROUTED} - {*DISTINCT})
pytestmark = pytest.mark.stopwatch


class Products(TorchDispatchMode):
    """Counts the operations of matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trials take a second an operation."""
    with Products() as products:
        monkeypatch.setattr(trial, "time", SimpleNamespace(perf_counter=lambda: float(products.total)))
        yield


def estimator_of(path: Path, *, streamed: bool = False) -> Estimator:
    return Estimator(find_checkpoint(str(path)), hp.ComputeConfig(device="cpu"), streamed=streamed)


def operations(path: Path, *, forward_only: bool = False) -> int:
    """Of 3 windows of 20 tokens: through all blocks, or to the entropy and back to every activation."""
    model, tokens = load(path).eval().requires_grad_(False), tiny_tokens(1, 20)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    with Products() as products, recorded_activations(model) as activations:
        if forward_only:
            model.base_model(input_ids=tokens, use_cache=False)
        else:
            entropy = mean_entropy(model(input_ids=tokens, use_cache=False).logits, tokens).sum()
            torch.autograd.grad(entropy, activations)
    total: int = 3 * products.total
    return total


@pytest.mark.by_layout
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trial_does_what_scoring_does_in_every_family(
    variant: str, make_checkpoint: Callable[..., Path], counted: None
) -> None:
    path = make_checkpoint(family=variant)
    tried = estimator_of(path).scoring(REQUEST, 3, 20).seconds
    if FAMILIES[family_name(variant)].experts:  # in a trial all tokens see the same ones, in blocks that all have them
        assert tried == pytest.approx(operations(path), rel=0.5)
    else:
        assert tried == operations(path)


@pytest.mark.parametrize("variant", DISTINCT + [pytest.param(each, marks=pytest.mark.exhaustive) for each in REST])
def test_a_trial_does_what_every_kind_of_criterion_asks_for(
    variant: str, make_checkpoint: Callable[..., Path], counted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(family=variant)
    estimator, costs = estimator_of(path), {}
    for criterion in ("hfprune", "fisher", "flap", "self-distillation", "cross-entropy"):
        costs[criterion] = estimator.scoring([(criterion, CriterionOptions())], 3, 20)
        assert costs[criterion].memory > estimator.base
    seconds = {criterion: cost.seconds for criterion, cost in costs.items()}
    assert seconds["hfprune"] == seconds["fisher"] == seconds["cross-entropy"]
    assert seconds["self-distillation"] > 2 * seconds["hfprune"], "it has two stages, and a teacher in the second"
    if variant in FORMS:
        assert seconds["flap"] == operations(path, forward_only=True), "it needs no gradients"
    assert estimator.repair(3, 20, 24).seconds > 2 * seconds["flap"], "of the dense model, and of the one that is cut"
    monkeypatch.setattr(Estimator, "rates", (2.0, 0.0, 0.0))
    stored = 4 * sum(parameter.numel() for parameter in find_blocks(load(path)).parameters())
    for streamed in (False, True):
        reading = estimator_of(path, streamed=streamed).scoring([("magnitude", CriterionOptions())], 0, 0).seconds
        assert reading == 2.0 * stored * streamed, "it reads no text"


@pytest.mark.parametrize("variant", DISTINCT[:3])
def test_reading_is_one_forward_pass_to_the_logits(
    variant: str, make_checkpoint: Callable[..., Path], counted: None
) -> None:
    path = make_checkpoint(family=variant)
    with Products() as products:
        load(path)(input_ids=tiny_tokens(1, 20), use_cache=False)
    assert estimator_of(path).reading(3 * 20, 20) == 3 * products.total


@pytest.mark.parametrize("layers", [3, 5])
def test_seconds_follow_from_the_trial(
    layers: int, make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed(model: Any, tokens: torch.Tensor, jobs: Any, recompute: bool) -> float:
        blocks, vocabulary = len(model.model.layers), model.config.vocab_size
        return float(tokens.numel() * (7 + 20 * blocks + 3 * vocabulary))

    monkeypatch.setattr(cost_model, "sweep", timed)
    monkeypatch.setattr(trial, "VOCABULARY", 50)
    path = make_checkpoint(num_hidden_layers=layers)
    for size in (1, 2):
        estimator = Estimator(find_checkpoint(str(path)), hp.ComputeConfig(device="cpu", batch_size=size))
        found = estimator.scoring(REQUEST, 8, 16).seconds
        assert found == pytest.approx(8 * 16 * (7 + 20 * layers + 3 * 257))


def test_long_windows_are_tried_by_their_first_positions(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def timed(model: Any, tokens: torch.Tensor, jobs: Any, recompute: bool) -> float:
        seen.append(tokens.shape[1])
        return float(tokens.numel() * len(model.model.layers))

    monkeypatch.setattr(cost_model, "sweep", timed)
    monkeypatch.setattr(trial, "product_speed", lambda *_: 1e5)
    estimator = Estimator(find_checkpoint(str(make_checkpoint(num_hidden_layers=4))), hp.ComputeConfig(device="cpu"))
    assert estimator.scoring(REQUEST, 2, 640).seconds == pytest.approx(2 * 640 * 4)
    assert set(seen) == {32}


def test_streamed_weights_take_two_blocks_and_what_a_group_keeps(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path, memory = make_checkpoint(num_hidden_layers=6), {}
    for how, compute in {
        "resident": hp.ComputeConfig(device="cpu"),
        "streamed": hp.ComputeConfig(device="cpu", stream=True),
        "scratch": hp.ComputeConfig(device="cpu", stream=True, scratch=str(tmp_path)),
    }.items():
        estimator = Estimator(find_checkpoint(str(path)), compute, streamed=how != "resident")
        estimator.base = estimator.weights  # not that of this process
        memory[how] = estimator.scoring(REQUEST, 5, 20)
    assert memory["scratch"].memory < memory["streamed"].memory
    model = find_checkpoint(str(path)).skeleton()
    block = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    head, states = 4 * 24 * 2**20 + 4 * VOCABULARY * 24, 5 * 3 * 20 * 24 * 4
    assert memory["scratch"].memory == max(2 * 4 * block, head) + states, "tiny blocks are smaller than logits"
    assert memory["streamed"].memory - memory["scratch"].memory == memory["scratch"].disk == 5 * 6 * 20 * 24 * 4


@pytest.mark.parametrize("more", [[], ["--repair", "none"], ["--criterion", "magnitude"]])
def test_a_dry_run_says_what_it_would_cost_and_makes_nothing(world: Path, tmp_path: Path, more: list[str]) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    words = ("prune", world / "dense", "--output", tmp_path / "out", "--width", 24, *text, *more)
    dry = run(*words, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    assert list(tmp_path.iterdir()) == []
    assert dry.json["stages"][0]["name"] == "reading the calibration data"
    steps = [cost["step"] for cost in dry.json["expected"]]
    told = run(*words, "--dry-run")
    assert "Dry run: nothing written" in told.out
    assert all(step in told.out for step in steps)
    real = run(*words, "--json")
    assert real.code == 0, real.err
    assert [cost["step"] for cost in real.json["expected"]] == steps
    assert [stage["name"] for stage in real.json["stages"]][-len(steps) :] == steps, (
        "what was foreseen is what was done"
    )
    written = real.json["expected"][-1]["disk"]
    assert written == pytest.approx(real.json["results"]["weight_bytes"]["after"], rel=0.1)


def test_a_dry_run_checks_what_a_run_checks(world: Path, tmp_path: Path) -> None:
    words = ("score", world / "dense", "--output", tmp_path / "scores", "--dry-run")
    refused(run(*words), "needs data: give --calibration")
    text = ("--calibration", world / "calibration.txt", "--seq-len", 24)
    refused(run(*words, *text, "--num-samples", 4000), "4000 windows")
    found = run(*words, *text, "--num-samples", 2)
    assert found.code == 0, found.err
    assert not (tmp_path / "scores").exists()


def test_what_is_not_counted_is_told(world: Path, tmp_path: Path, smollm2_gguf: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    words = ("prune", world / "dense", "--output", tmp_path / "out", "--width", 24, "--dry-run")
    sampled = run(*words, "--calibration", "self", *text[2:])
    assert "Not included in the estimate: sampling text from the model." in sampled.err
    assert "Not included" not in run(*words, *text).err
    plain = ("--criterion", "magnitude", "--repair", "none", "--ratio", 0.2, "--dry-run", "--json")
    packed = run("prune", smollm2_gguf, "--output", tmp_path / "out", *plain)
    assert packed.code == 0, packed.err
    assert "Not included in the estimate: reading the weights." in packed.err
    assert packed.json["expected"][-1]["disk"] == pytest.approx(432e6, rel=0.01), "float32, whatever the file holds"


def test_a_dry_run_downloads_no_weights(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub"
    shutil.copytree(world / "dense", folder)
    (folder / "model.safetensors").unlink()
    words = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24, "--dry-run")
    refused(run("score", folder, "--output", tmp_path / "out", *words), "lacks the weight file model.safetensors")
    monkeypatch.setattr(
        "hifiprune.commands.prepare.find_checkpoint", lambda name: Checkpoint(name, folder, on_hub=True)
    )
    found = run("score", "somebody/model", "--output", tmp_path / "out", *words, "--json")
    assert found.code == 0, found.err
    assert "Not included in the estimate: downloading the weights." in found.err
    assert found.json["expected"][1]["seconds"] > found.json["expected"][0]["seconds"] == 0, "it is not here to be read"


def test_scoring_and_repair_follow_from_the_pace_of_a_block(world: Path, tmp_path: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 4, "--seq-len", 24)
    words = ("prune", world / "dense", "--output", tmp_path / "out", "--width", 24, *text, "--dry-run", "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Estimator, "_tried", lambda *_: Pace(1.0, 0.0))
        patch.setattr(Estimator, "moments", lambda *_: 0.0)
        patch.setattr(Estimator, "solution", lambda *_: 0.0)
        found = run(*words).json["expected"]
    seconds = {cost["step"]: cost["seconds"] for cost in found}
    assert seconds["cutting and repairing"] == pytest.approx(3 * 4 * 2.3)
    assert seconds["scoring"] == pytest.approx(3 * 4)


class Figures(Estimator):
    """What was measured of the pace of an H100 with the shape of Llama-2-7B, windows of 1,024 tokens one by one."""

    rates = 1 / 1.43e9, 1 / 0.4407e9, 1 / 6.618e9

    def _tried(self, work: Any, size: int, positions: int, *details: Any) -> Pace:
        if details and details[0]:
            return Pace((0.1351 - 0.0207) / 32, 0.0207)
        return Pace(3.463 / 2048, 0.0)

    def moments(self, tokens: int, width: int) -> float:
        return 5.868 / 1024

    def moving(self, tokens: int, width: int) -> float:
        return 12.35 / 1024

    def solution(self, width: int) -> float:
        return (2.363 + 0.5505) / 32


def test_a_run_on_an_h100_is_foretold_within_a_third(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, vocab_size=32_000, dtype=torch.bfloat16
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    compute = hp.ComputeConfig(device="cpu", dtype="bfloat16", batch_size=1, recompute=False)
    estimator = Figures(find_checkpoint(str(tmp_path)), compute)
    estimator.device, estimator._free = torch.device("cuda"), 0  # as if states had no room there: they went to the host
    took = {"loading": 39.09, "scoring": 3.846, "repair": 21.25, "writing": 7.506}  # hifiprune prune, 32 windows
    foretold = {
        "loading": estimator.loading(),
        "scoring": estimator.scoring([("entropy-square", CriterionOptions())], 32, 1024),
        "repair": estimator.repair(32, 1024, 7552),
        "writing": estimator.writing(1 - 0.2017),
    }
    assert {step: cost.seconds for step, cost in foretold.items()} == {
        step: pytest.approx(seconds, rel=0.3) for step, seconds in took.items()
    }
    whole = estimator.repair(32, 1024, 7552)
    assert whole.seconds == pytest.approx(25.05, rel=0.3), "by itself, as it was timed too"
    estimator._free = 60 * 10**9
    stay = estimator.repair(32, 1024, 7552)
    assert whole.seconds - stay.seconds == pytest.approx(12.35), "states stay on the GPU now"
    assert stay.memory - whole.memory == 32 * 1024 * (2 * 4096 + 7552) * 2


def test_a_gpu_is_tried_with_what_it_will_do(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = estimator_of(checkpoint)
    shapes: list[Any] = []
    monkeypatch.setattr(HeldOut, "add", lambda _, *values: shapes.append(values[0].shape))
    monkeypatch.setattr(Moments, "solve", lambda moments, _: shapes.append(moments.gram.shape))
    monkeypatch.setattr(Moments, "error", lambda *_: 0.0)
    for on_cpu in (True, False):
        monkeypatch.setattr(Estimator, "on_cpu", on_cpu)
        shapes.clear()
        estimator.moments(1024, 7552)
        estimator.solution(7552)
        wanted = {(1, 298, 4096), (1024, 1024)} if on_cpu else {(1, 1024, 7552), (7552, 7552)}
        assert {*map(tuple, shapes)} == wanted
        assert (estimator.moving(64, 32) > 0) != on_cpu
