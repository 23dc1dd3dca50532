"""The commands from a user's side: what they print and write, and how they refuse and fail."""

import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hifiprune import Plan
from hifiprune.cli import start
from hifiprune.cli.app import main
from hifiprune.cli.signals import Stopped
from hifiprune.io.atomic import replacing
from hifiprune.models.checkpoint import Checkpoint
from tests.commands import Cli, Result, leftovers, refused, run


@pytest.fixture
def cli() -> Cli:
    """Run the command line in this process."""
    return run


CALIBRATION = ("--num-samples", 4, "--seq-len", 16, "--round-to", 8)


def test_prune_writes_an_ordinary_checkpoint(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    (checkpoint / "LICENSE").write_text("terms")
    (checkpoint / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.7, "eos_token_id": 2}')
    output = tmp_path / "pruned"
    result = cli(
        "prune", checkpoint, "--output", output, "--neuron-ratio", 0.4, "--calibration", text, *CALIBRATION, "--json"
    )
    assert result.code == 0, result.err
    record = result.json
    assert record == json.loads((output / "run.json").read_text())
    assert record["results"]["width"] == {"before": 40, "after": 24}
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.intermediate_size == 24
    assert record["results"]["parameters"]["after"] == sum(p.numel() for p in model.parameters())
    assert (
        AutoTokenizer.from_pretrained(output)("abc").input_ids
        == AutoTokenizer.from_pretrained(checkpoint)("abc").input_ids
    )
    for name in ("LICENSE", "generation_config.json"):
        assert (output / name).read_bytes() == (checkpoint / name).read_bytes()
    assert {stage["name"] for stage in record["stages"]} >= {"scoring", "cutting and repairing", "writing"}
    assert all(stage["peak_memory_bytes"] > 1e6 for stage in record["stages"])
    assert not leftovers(tmp_path)
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    assert {file.stat().st_mode for file in output.rglob("*") if file.is_file()} == {usual}


def test_scores_prune_at_any_ratio_to_the_same_plan(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    assert (
        cli("score", checkpoint, "--output", tmp_path / "s.safetensors", "--calibration", text, *CALIBRATION[:4]).code
        == 0
    )
    outputs = []
    for name, source in (
        ("a", ("--scores", tmp_path / "s.safetensors")),
        ("b", ("--calibration", text, *CALIBRATION[:4], "--repair", "none")),
    ):
        outputs.append(tmp_path / name)
        result = cli("prune", checkpoint, "--output", outputs[-1], "--ratio", 0.1, "--round-to", 1, *source)
        assert result.code == 0, result.err
    plans = [(output / "hifiprune" / "plan.json").read_bytes() for output in outputs]
    assert plans[0] == plans[1]
    plan = Plan.load(outputs[0] / "hifiprune" / "plan.json")
    assert plan.ratio_reached == pytest.approx(0.1, abs=0.01)
    weights = [load_file(output / "model.safetensors") for output in outputs]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    record = json.loads((outputs[0] / "run.json").read_text())
    assert record["arguments"]["scores"] == str(tmp_path / "s.safetensors")


def test_evaluate_prints_every_metric(cli: Cli, checkpoint: Path, text: Path) -> None:
    result = cli("evaluate", checkpoint, "--against", checkpoint, "--text", text, "--seq-len", 32, "--json")
    assert result.code == 0, result.err
    (row,) = result.json["results"]["models"].values()
    metrics = row["metrics"]
    assert metrics["kl"] == {"value": 0, "low": 0, "high": 0}
    assert metrics["top5_jaccard"]["value"] == 1
    assert metrics["perplexity"]["low"] < metrics["perplexity"]["value"] < metrics["perplexity"]["high"]
    table = cli("evaluate", checkpoint, "--against", checkpoint, "--text", text, "--seq-len", 32, "--max-windows", 3)
    assert "top-5 Jaccard similarity" in " ".join(table.out.split())
    assert "3 windows of 32 tokens" in table.out


def test_inspect_loads_no_weights(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "load", None)
    facts = cli("inspect", checkpoint, "--json").json
    total = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(checkpoint).parameters())
    assert facts["parameters"]["total"] == total
    assert sum(facts["parameters"].values()) == 2 * total
    assert facts["parameters"]["mlps"] == 3 * 40 * 24 * 3
    assert facts["widths"]["10%"]["width"] == round(40 - 0.1 * total / (3 * 72))
    assert facts["widths"]["50%"]["width"] is None
    assert "impossible" in cli("inspect", checkpoint).out


def test_calibrating_on_text_from_the_model_itself(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("--ratio", 0.1, "--calibration", "self", *CALIBRATION, "--json")
    hashes = [
        cli("prune", checkpoint, "--output", tmp_path / name, *arguments).json["results"]["data_hash"] for name in "ab"
    ]
    assert hashes[0] == hashes[1]


def test_the_output_keeps_the_checkpoints_dtype(
    cli: Cli, make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    folder = make_checkpoint("half", dtype="bfloat16")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    output = tmp_path / "out"
    arguments = ("--width", 20, "--calibration", text, *CALIBRATION, "--device", "cpu", "--json")
    result = cli("prune", folder, "--output", output, *arguments)
    assert result.code == 0, result.err
    assert result.json["results"]["scoring"]["compute_dtype"] == "float32"
    assert {tensor.dtype for tensor in load_file(output / "model.safetensors").values()} == {torch.bfloat16}


def test_scores_made_in_a_narrower_dtype_belong_to_the_stored_weights(
    cli: Cli, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    scores = ("--output", tmp_path / "s", "--calibration", text, *CALIBRATION[:4], "--dtype", "bfloat16")
    assert cli("score", checkpoint, *scores).code == 0
    arguments = ("--width", 8, "--scores", tmp_path / "s", "--seed=3")
    result = cli("prune", checkpoint, "--output", tmp_path / "out", *arguments)
    assert result.code == 0, result.err
    assert "Ignored, since the --scores were made before: --seed 3" in result.err
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_large_checkpoints_are_sharded(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("--width", 20, "--calibration", text, *CALIBRATION, "--shard-size", "20KB")
    assert cli("prune", checkpoint, "--output", tmp_path / "out", *arguments).code == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    smaller = ("--width", 8, *arguments[2:])
    again = cli("prune", tmp_path / "out", "--output", tmp_path / "twice", *smaller, "--json")
    assert again.json["results"]["width"] == {"before": 20, "after": 8}
    sorted((tmp_path / "out").glob("model-*.safetensors"))[-1].unlink()
    refused(cli("prune", tmp_path / "out", "--output", tmp_path / "x", *smaller), "lacks the weight file model-")
    (tmp_path / "out" / "model.safetensors.index.json").write_text("{}")
    refused(cli("prune", tmp_path / "out", "--output", tmp_path / "x", *smaller), "index.json is damaged")


BUDGETS = [
    (("--ratio", "0"), "ratio 0 must lie in (0, 1)"),
    (("--ratio", "1"), "ratio 1 must lie in (0, 1)"),
    (("--ratio", "20"), "did you mean 0.2?"),
    (("--ratio", "nan"), "ratio nan must lie in (0, 1)"),
    (("--ratio", "0.9"), "the largest possible --ratio is"),
    (
        ("--ratio", "0.2", "--width", "10"),
        "--width, --max-size; given: ratio, width",
    ),
    ((), "given: none"),
    (("--width", "40"), "width 40 must be below the model's own width 40"),
]


@pytest.mark.parametrize(("budget", "message"), BUDGETS)
def test_impossible_budgets(
    cli: Cli, checkpoint: Path, text: Path, tmp_path: Path, budget: tuple[str, ...], message: str
) -> None:
    refused(
        cli("prune", checkpoint, "--output", tmp_path / "out", "--calibration", text, *CALIBRATION, *budget), message
    )
    assert not (tmp_path / "out").exists()


def test_a_ratio_that_is_a_word(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    result = cli("prune", checkpoint, "--output", tmp_path / "out", "--ratio", "fifth", "--calibration", "self")
    assert result.code == 2
    assert result.err == "error: --ratio 'fifth' is no number (see 'hifiprune prune --help')\n"


def _break_missing(folder: Path) -> None:
    shutil.rmtree(folder)


def _break_empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _break_truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _break_architecture(folder: Path) -> None:
    _edit_config(folder, model_type="mamba", architectures=["MambaForCausalLM"])


def _break_model_type(folder: Path) -> None:
    _edit_config(folder, model_type="lama")


def _break_quantized(folder: Path) -> None:
    _edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def _break_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _break_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _break_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _break_gguf(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.with_suffix(".gguf").write_bytes(b"GGUF" + bytes(900))


def _break_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


MODELS = [
    (_break_missing, "there is no model folder or .gguf file"),
    (_break_empty, "holds no config.json (found: nothing)"),
    (_break_truncated, "model.safetensors is truncated or damaged"),
    (_break_config, "config.json is no JSON"),
    (_break_architecture, "model type 'mamba' is not in the table of families, and its MLPs could not be told"),
    (_break_model_type, "did you mean 'llama'"),
    (_break_quantized, "is quantized (gptq) and cannot be cut; prune the original checkpoint"),
    (_break_tokenizer, "has no tokenizer files"),
    (_break_pickled, "pytorch_model.bin would have to be unpickled"),
    (_break_tensor, "lacks 1 tensors, such as model.layers.1.mlp.up_proj.weight"),
    (_break_gguf, "is GGUF v0; this reader handles v2 and v3"),
    (_break_nan, "model.layers.1.mlp.up_proj.weight contain NaN or infinite values"),
]


@pytest.mark.parametrize(("damage", "message"), MODELS)
def test_unusable_models(
    cli: Cli, checkpoint: Path, text: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(checkpoint)
    model = checkpoint if checkpoint.exists() or damage is _break_missing else checkpoint.with_suffix(".gguf")
    refused(
        cli("prune", model, "--output", tmp_path / "out", "--width", 8, "--calibration", text, *CALIBRATION),
        message,
    )
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)


def test_a_hub_id_that_cannot_be_reached(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused(
        cli("inspect", "org/model"), "org/model, and the model hub could not be reached to look for org/model there"
    )


def test_a_hub_id_is_downloaded_as_far_as_it_is_needed(
    cli: Cli, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(name: str, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert cli("inspect", "org/model", "--json").json["neurons_per_mlp"] == 40
    assert not any(pattern == "*" or "bin" in pattern or "safetensors" in pattern.split(".")[-1:] for pattern in asked)
    arguments = ("--output", tmp_path / "out", "--width", 8, "--calibration", "self", *CALIBRATION)
    assert cli("prune", "org/model", *arguments).code == 0
    assert "model.safetensors" in asked


def test_other_values_out_of_range(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    start = ("prune", checkpoint, "--output", tmp_path / "out", "--width", 8, "--calibration", text)
    refused(cli(*start, "--seq-len", 65), "seq-len 65 exceeds the model's 64 positions; use --seq-len 64")
    refused(cli(*start, "--seq-len", 1), "seq-len 1 must be at least 2")
    refused(cli(*start, "--num-samples", 0), "num-samples 0 must be at least 1")
    refused(cli(*start, "--batch-size", 0), "batch-size 0 must be at least 1")
    refused(cli(*start, "--dtype", "float23"), "dtype 'float23' is not known")
    refused(cli(*start, "--device", "gpu7"), "device 'gpu7' is not known")
    refused(cli(*start, "--criterion", "entropi"), "did you mean 'entropy'")
    refused(cli(*start, "--sampler", "x"), "sampler 'x' is not known")
    refused(cli(*start, "--num-samples", 999, "--seq-len", 64), "too little text")
    refused(cli(*start, "--shard-size", "lots", *CALIBRATION), "shard size 'lots'")
    refused(cli(*start, "--attention", "flash_attention_9", *CALIBRATION), "attention")
    refused(
        cli(*start, "--scores", text, "--repair", "none"),
        "--scores replaces scoring: drop --calibration, or use it with --repair ridge",
    )
    refused(cli(*start[:-2]), "criterion 'entropy-square' needs data: give --calibration, or --scores made before")
    if not torch.cuda.is_available():
        refused(cli(*start, "--device", "cuda"), "sees no CUDA GPU; use --device cpu")
    refused(cli(*start, "--device", "mps"), "device 'mps' is not known")
    refused(cli(*start, "--shard-size", "5GiB", *CALIBRATION), "shard size '5GiB'")
    refused(cli("evaluate", checkpoint, "--text", text, "--seq-len", 65), "seq-len 65 exceeds")
    refused(cli("evaluate", checkpoint, "--text", "self", "--seq-len", 16), "'self' is text for calibration only")
    refused(cli("inspect", "~nobody-of-this-name/x"), "there is no model folder or .gguf file")
    (tmp_path / "short.txt").write_text("few words")
    refused(
        cli("evaluate", checkpoint, "--text", tmp_path / "short.txt", "--seq-len", 32),
        "its 9 tokens make no window of 32",
    )
    refused(cli("evaluate", checkpoint, "--text", tmp_path / "missing.txt", "--seq-len", 32), "does not exist")
    assert not (tmp_path / "out").exists()


def test_scores_of_another_model_are_refused(
    cli: Cli, make_checkpoint: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    first = make_checkpoint("first")
    assert cli("score", first, "--output", tmp_path / "s", "--calibration", text, *CALIBRATION[:4]).code == 0
    second = make_checkpoint("second", initializer_range=0.1)
    refused(
        cli("prune", second, "--output", tmp_path / "out", "--width", 8, "--scores", tmp_path / "s"), "another model"
    )
    refused(
        cli("prune", first, "--output", tmp_path / "out", "--width", 8, "--scores", text), "no readable scores file"
    )
    assert not (tmp_path / "out").exists()


def test_outputs_that_must_not_be_written(cli: Cli, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    def prune(output: Path, *more: str) -> Result:
        return cli("prune", checkpoint, "--output", output, "--width", 8, "--calibration", text, *CALIBRATION, *more)

    (tmp_path / "taken").mkdir()
    refused(prune(tmp_path / "taken"), "exists already; choose another name, or replace it with --overwrite")
    refused(prune(checkpoint, "--overwrite"), "is the input")
    refused(prune(tmp_path, "--overwrite"), "contains the input")
    refused(prune(text, "--overwrite"), "is the input")
    (tmp_path / "file").write_text("x")
    refused(prune(tmp_path / "file" / "out"), "is not a writable folder")
    refused(prune(tmp_path / "file", "--overwrite"), "is not a folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    refused(prune(tmp_path / "link"), "exists already")
    refused(prune(tmp_path / "link", "--overwrite"), "is not a folder")
    score = ("score", checkpoint, "--calibration", text, *CALIBRATION[:4], "--overwrite", "--output")
    refused(cli(*score, tmp_path / "taken"), "is not a file")
    refused(cli(*score, text), "is the input")
    assert prune(tmp_path / "taken", "--overwrite").code == 0
    assert (tmp_path / "taken" / "config.json").is_file()
    assert not leftovers(tmp_path)


def test_a_full_disk_is_foreseen(
    cli: Cli, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(Checkpoint, "load", None)  # refused before weights load
    arguments = ("--width", 8, "--calibration", text, *CALIBRATION)
    refused(
        cli("prune", checkpoint, "--output", tmp_path / "out", *arguments), "has 1 byte free, the output needs", code=1
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(words, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_fills_up_leaves_nothing(
    cli: Cli, checkpoint: Path, text: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for story in ("commands.prune_preflight", "pruning.cut_checkpoint"):
        monkeypatch.setattr(f"hifiprune.{story}.check_space", lambda *_: None)
    arguments = ("--width", 8, "--calibration", text, *CALIBRATION)
    refused(cli("prune", checkpoint, "--output", small_disk / "out", *arguments), "the disk is full", code=1)
    assert not any(small_disk.iterdir())


STAGES = [
    "commands.prune_preflight.prepare",
    "commands.steps.read_texts",
    "models.checkpoint.Checkpoint.load",
    "commands.steps.score_all",
    "commands.prune.allocate",
    "commands.prune.cut_and_repair_",
    "pruning.cut_checkpoint.write_shard",
    "pruning.cut_checkpoint.save_model",
    "plan.Plan.save",
]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", STAGES)
def test_signals_in_every_stage_leave_nothing(
    cli: Cli, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, number: int
) -> None:
    owner = pkgutil.resolve_name(f"hifiprune.{stage}")

    def interrupted(*arguments: Any, **options: Any) -> Any:
        result = owner(*arguments, **options)
        os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(f"hifiprune.{stage}", interrupted)
    old = (tmp_path / "out", "kept from before")
    with replacing(old[0]) as folder:
        folder.mkdir()
        (folder / "note").write_text(old[1])
    arguments = ["--width", 8, "--calibration", text, *CALIBRATION, "--overwrite"]
    arguments += ["--repair", "none"] if stage == "pruning.cut_checkpoint.write_shard" else []
    result = cli("prune", checkpoint, "--output", tmp_path / "out", *arguments)
    refused(result, f"interrupted by {signal.Signals(number).name}", code=1)
    assert (old[0] / "note").read_text() == old[1]
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("command", "stage"),
    [
        (("score", "--calibration", "TEXT", "--output", "OUT"), "commands.steps.score_all"),
        (("score", "--calibration", "self", "--output", "OUT"), "commands.steps.sample_windows"),
        (("evaluate", "--text", "TEXT"), "commands.evaluate.measure"),
        (("evaluate", "--text", "TEXT"), "models.checkpoint.Checkpoint.load"),
    ],
)
def test_signals_in_the_other_commands(
    cli: Cli,
    checkpoint: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    stage: str,
    number: int,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(f"hifiprune.{stage}", interrupted)
    words = {"TEXT": str(text), "OUT": str(tmp_path / "out")}
    name, *rest = (words.get(word, word) for word in command)
    more = CALIBRATION[:4] if name == "score" else ("--seq-len", 16)
    refused(cli(name, checkpoint, *rest, *more), f"interrupted by {signal.Signals(number).name}", code=1)
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    target, calls, real = tmp_path / "out", [], os.rename
    target.mkdir()
    (target / "note").write_text("old")

    def interrupted(source: Any, destination: Any) -> None:
        real(source, destination)
        calls.append(destination)
        if len(calls) == call:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)

    def write() -> None:
        with replacing(target) as new:
            new.mkdir()
            (new / "note").write_text("new")

    with pytest.raises(KeyboardInterrupt):
        write()
    assert (target / "note").read_text() == ("old" if call == 1 else "new")
    assert not leftovers(tmp_path)


LONG = (
    "--width",
    "8",
    "--calibration",
    "python-docs",
    "--sampler",
    "stream",
    "--num-samples",
    "6000",
    "--seq-len",
    "64",
)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.exhaustive)])
def test_a_real_process_stops_at_once_while_it_scores(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "hifiprune", "prune", str(checkpoint), "--output", str(tmp_path / "out"), *LONG]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        before = next(line for line in process.stderr if line.startswith("Scoring "))
        time.sleep(1)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert "on 6000 windows of 64 tokens" in before
    assert process.returncode == 1
    assert f"interrupted by {number.name}" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert not leftovers(tmp_path)


def test_bugs_show_a_traceback_only_with_debug(cli: Cli, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "skeleton", lambda _: 1 / 0)
    refused(cli("inspect", checkpoint), "ZeroDivisionError: division by zero (a bug", code=1)
    monkeypatch.setattr(sys, "argv", ["hifiprune", "inspect", str(checkpoint), "--debug"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_importing_the_command_line_loads_no_torch() -> None:
    code = "import sys, hifiprune.cli.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_list_of_commands_needs_no_large_library() -> None:
    large = {"torch", "transformers", "numpy", "datasets", "pyarrow", "rich", "httpx", "httpx2", "pydantic"}
    code = f"""
import sys
from hifiprune.cli.app import main
sys.argv = ["hifiprune", "--help"]
try:
    main()
finally:
    print(sorted({{name.partition(".")[0] for name in sys.modules}} & {large}))
"""
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    *text, imported = shown.splitlines()
    assert imported == "[]"
    assert any(line.startswith("  prune ") for line in text)


def test_without_a_command_the_list_of_commands_is_shown(cli: Cli) -> None:
    shown = cli()
    assert (shown.code, shown.err) == (2, "")
    assert shown.out == cli("--help").out


def test_nothing_is_imported_before_signals_are_handled() -> None:
    code = "import sys; before = {*sys.modules}; import hifiprune.cli.start; print(sorted({*sys.modules} - before))"
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (
        found.stdout
        == "['hifiprune', 'hifiprune.cli', 'hifiprune.cli.signals', 'hifiprune.cli.start', 'hifiprune.version']\n"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("SIGINT")])
def test_an_interruption_of_the_imports_is_one_message(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def interrupted() -> None:
        raise error

    monkeypatch.setattr("hifiprune.cli.start.handle_signals", interrupted)
    with pytest.raises(SystemExit, match="error: interrupted by SIGINT: no half-written output is left"):
        start.main()
