"""Files that a user or another tool changed, each refused in one message before any work: value, limit, remedy."""

import errno
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hifiprune as hp
from hifiprune.engine.compute import check_attention
from tests.commands import leftovers, refused, run
from tests.conftest import save_checkpoint

CHANGED = "was changed since hifiprune wrote it"
FIRST = "model.layers.0.mlp"


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned checkpoint, `pruned`, its scores, and what `evaluate` and `recover` made of it."""
    folder, dense = tmp_path_factory.mktemp("made"), str(world / "dense")
    text = hp.Calibration(str(world / "calibration.txt"), 2, 16)
    hp.score_checkpoint(dense, folder / "scores", hp.ScoreConfig(text))
    hp.prune(dense, folder / "pruned", hp.PruneConfig(hp.Budget(width=24), text, repair="none"))
    hp.evaluate(
        str(folder / "pruned"), hp.EvaluateConfig(hp.Text(str(world / "held.txt"), 16, 1), dense), folder / "measured"
    )  # fmt: skip
    return folder


Metadata = dict[str, Any]
Edit = Callable[[dict[str, Tensor], Metadata], object]
SCORES: list[tuple[Edit, str]] = [
    (lambda tensors, facts: tensors.update({FIRST: tensors[FIRST][:30]}), f"{FIRST} of 30 neurons"),
    (
        lambda tensors, facts: (tensors.pop(FIRST), facts["names"].pop(0), facts["parameters_per_neuron"].pop(0)),
        "2 MLPs were scored, this model has 3; score this model",
    ),
    (lambda tensors, facts: facts["names"].pop(), "2 different names of 2, 3 sizes"),
    (lambda tensors, facts: facts.update(names=[]), "names: List should have at least 1 item"),
    (lambda tensors, facts: facts.update(names=None), "names: Input should be a valid"),
    (lambda tensors, facts: facts.update(settings=None), "settings: Input should be an object, not None"),
    (lambda tensors, facts: facts.update(model_hash=5), "model_hash: Input should be a valid string, not 5"),
    (lambda tensors, facts: facts.update(model_hash="5" * 64), "from weights 555555555555"),
    (lambda tensors, facts: facts.update(criterion="entropi"), "criterion 'entropi' is not known; known are hfprune,"),
    (lambda tensors, facts: facts.update(criterion="obs"), "criterion 'obs' is not known; known are hfprune,"),
    (lambda tensors, facts: facts.update(total_parameters=-1), "total_parameters: Input should be greater than 0"),
    (lambda tensors, facts: facts.update(total_parameters=5), "a model of 5 parameters was scored"),
    (lambda tensors, facts: facts.update(parameters_per_neuron=[0] * 3), "parameters_per_neuron.0: Input should be"),
    (lambda tensors, facts: facts.update(parameters_per_neuron=[7] * 3), f"{FIRST} of 40 neurons with 7 parameters"),
    (lambda tensors, facts: tensors.update({FIRST: tensors[FIRST].int()}), "torch.int32 [40] and should be float32"),
    (lambda tensors, facts: tensors.update({FIRST: tensors[FIRST][None]}), "[1, 40] and should be float32 [neurons]"),
    (lambda tensors, facts: tensors.update({FIRST: tensors[FIRST] / 0}), f"{FIRST} contain NaN or infinite"),
    (lambda tensors, facts: tensors.pop(FIRST), f"the tensor {FIRST} is missing"),
    (lambda tensors, facts: tensors.update(more=torch.ones(3)), "the tensor more is not named"),
    (lambda tensors, facts: tensors.update({f"{FIRST}.mean": torch.ones(3)}), "is missing"),
    (lambda tensors, facts: facts.pop("format"), "holds no scores in the format"),
]


@pytest.mark.parametrize("case", range(len(SCORES)))
def test_scores_that_were_changed(
    world: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: int
) -> None:
    edit, message = SCORES[case]
    with safe_open(made / "scores", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["hifiprune"])
    edit(tensors, facts)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "s", {"hifiprune": json.dumps(facts)}
    )
    monkeypatch.setattr("hifiprune.models.checkpoint.Checkpoint.load", None)  # refused before weights load
    monkeypatch.setattr("hifiprune.commands.prepare.Checkpoint.load", None)
    start = (world / "dense", "--scores", tmp_path / "s", "--output", tmp_path / "out")
    for words in (("prune", *start, "--width", 24), ("ablate", *start, "--text", world / "held.txt", "--seq-len", 16)):
        if "from weights" not in message or words[0] == "prune":
            refused(run(*words), message)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_scores_in_memory_must_fit_the_model(world: Path, made: Path, tmp_path: Path) -> None:
    scores = hp.Scores.load(made / "scores")
    scores.values.pop()
    scores.names.pop()
    scores.parameters_per_neuron.pop()
    with pytest.raises(hp.UserError, match="2 MLPs were scored, this model has 3"):
        hp.prune(str(world / "dense"), tmp_path / "out", hp.PruneConfig(hp.Budget(width=24)), scores=scores)


RECORDS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda record: record.update(arguments=None), "prune.arguments: Input should be an object, not None"),
    (lambda record: record.update(results=[]), "results: Input should be an object"),
    (lambda record: record.update(command=["prune"]), "command"),
    (lambda record: record.update(command="prume"), "prume"),
    (lambda record: record.update(stages=[]), "stages: List should have at least 1 item"),
    (lambda record: record["arguments"].pop("model"), "arguments.model: Field required"),
    (lambda record: record["arguments"].update(model=7), "arguments.model: Input should be a valid string, not 7"),
    (lambda record: record["results"].update(width=3), "results.width: Input should be an object, not 3"),
    (lambda record: record["results"].pop("ratio"), "results.ratio: Field required"),
    (
        lambda record: record["stages"][0].update(seconds="long"),
        "stages.0.seconds: Input should be a valid number, not",
    ),
]


@pytest.mark.parametrize("case", range(len(RECORDS)))
def test_records_that_were_changed(made: Path, world: Path, tmp_path: Path, case: int) -> None:
    edit, message = RECORDS[case]
    pruned = shutil.copytree(made / "pruned", tmp_path / "pruned")
    record = json.loads((pruned / "run.json").read_text())
    edit(record)
    (pruned / "run.json").write_text(json.dumps(record))
    data = ("--data", world / "calibration.txt", "--max-steps", 1, "--seq-len", 24)
    for words in (
        ("report", pruned, "--output", tmp_path / "r.html"),
        ("inspect", pruned, "--deploy"),
        ("recover", pruned, "--output", tmp_path / "r", *data),
        ("recover", pruned, "--output", tmp_path / "r", *data, "--distill-weight", 0),
        ("recover", pruned, "--output", tmp_path / "r", *data, "--teacher", world / "dense"),
    ):
        refused(run(*words), f"run.json {CHANGED} (")
        refused(run(*words), message.removeprefix("prune."))
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


@pytest.mark.parametrize("keep", [0.5, 0.98])
def test_truncated_records(made: Path, tmp_path: Path, keep: float) -> None:
    pruned = shutil.copytree(made / "pruned", tmp_path / "pruned")
    measured = shutil.copytree(made / "measured", tmp_path / "measured")
    for path in (pruned / "run.json", measured / "passages.json", pruned / "hifiprune" / "plan.json"):
        text = path.read_text()
        path.write_text(text[: int(keep * len(text))])
        folder = pruned if path.is_relative_to(pruned) else measured
        if path.name == "run.json":
            refused(run("inspect", pruned), f"{path} {CHANGED} (Invalid JSON: EOF")
        refused(run("report", folder, "--output", tmp_path / "r.html"), f"{path.name} {CHANGED} (Invalid JSON: EOF")
        path.write_text(text)
    assert run("report", pruned, measured, "--output", tmp_path / "r.html").code == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda plan: plan.update(kept=[[0, 1]]), "3 names, 1 lists of neurons, 3 widths"),
        (lambda plan: plan.update(kept=[[10**30]] * 3), "kept.0.0: Input should be less than 2147483648"),
        (lambda plan: plan.update(kept=[["0"]] * 3), "kept.0.0: Input should be a valid integer, not '0'"),
        (lambda plan: plan["kept"][0].reverse(), "must keep neurons of 0 to 39 in ascending order"),
        (lambda plan: plan["kept"][0].insert(1, plan["kept"][0].pop(2)), "must keep neurons of 0 to 39 in ascending"),
        (lambda plan: plan["kept"][0].__setitem__(1, plan["kept"][0][0]), "must keep neurons of 0 to 39 in ascending"),
        (lambda plan: plan.update(neurons=None), "neurons: Input should be a valid"),
        (lambda plan: plan.pop("format"), "is not a readable plan in the format hifiprune-plan-1"),
    ],
)
def test_plans_that_were_changed(
    made: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    pruned = shutil.copytree(made / "pruned", tmp_path / "pruned")
    plan = json.loads((pruned / "hifiprune" / "plan.json").read_text())
    edit(plan)
    (pruned / "hifiprune" / "plan.json").write_text(json.dumps(plan))
    refused(run("report", pruned, "--output", tmp_path / "r.html"), message)
    assert not leftovers(tmp_path)


CONFIGURATIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"intermediate_size": 40.0},
        "intermediate_size is 40.0 and should be something else (Field 'intermediate_size'",
    ),
    ({"intermediate_size": -1}, "intermediate_size is -1 and should be a whole number from 1 to 16,777,216"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0 and should be a whole number from 1 to 1,000"),
    ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000 and should be a whole number from 1 to 1,000"),
    ({"num_hidden_layers": "3"}, "num_hidden_layers is '3' and should be something else"),
    ({"num_hidden_layers": True}, "num_hidden_layers is True and should be something else"),
    ({"vocab_size": 0}, "vocab_size is 0 and should be a whole number from 1 to 67,108,864"),
    ({"vocab_size": 10**18}, "vocab_size is 1000000000000000000 and should be"),
    ({"hidden_size": 0}, "hidden_size is 0 and should be a whole number from 1 to 1,048,576"),
    ({"max_position_embeddings": 0}, "max_position_embeddings is 0 and should be a whole number from 1"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0 and should be"),
    ({"num_attention_heads": 7}, "is not a multiple of the number of attention heads (7)"),
    ({"num_attention_heads": 4, "num_key_value_heads": 3}, "num_key_value_heads is 3 and should be a divisor of"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0 and should be"),
    ({"mlp_widths": [8]}, "mlp_widths is [8] and should be 3 whole numbers from 1 to 16,777,216, one a layer"),
    ({"mlp_widths": [8, 8, 10**9]}, "mlp_widths is [8, 8, 1000000000] and should be 3 whole numbers"),
    ({"mlp_widths": "wide"}, "mlp_widths is 'wide' and should be 3 whole numbers"),
    ({"mlp_widths": [8, 8, 8], "mlp_maps": ["mlp"]}, "mlp_maps is ['mlp'] and should be a list of module paths"),
    ({"hidden_act": "frob"}, "hidden_act is 'frob' and should be something else"),
    ({"rope_parameters": []}, "rope_parameters is [] and should be something else"),
    ({"rope_parameters": {"rope_type": "bogus", "rope_theta": 1e4}}, "rope_parameters.rope_type is 'bogus'"),
    ({"layer_types": 5}, "layer_types is 5 and should be something else ('int' object is not iterable)"),
    ({"layer_types": ["bogus"] * 3}, "layer_types is ['bogus', 'bogus', 'bogus'] and should be something else"),
    ({"pad_token_id": 9999}, "pad_token_id is 9999 and should be something else (Padding_idx must be within"),
    ({"dtype": "frob"}, "dtype is 'frob' and should be something else"),
    ({"id2label": 5}, "id2label is 5 and should be something else"),
    ({"architectures": 5}, "architectures is 5 and should be a list of names"),
    ({"model_type": ["llama"]}, "model_type is ['llama'] and should be a name"),
    ({"model_type": None}, "model_type is None and should be a name"),
]


@pytest.mark.parametrize(("changes", "message"), CONFIGURATIONS)
def test_configurations_that_cannot_be(world: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    facts = json.loads((world / "dense" / "config.json").read_text())
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(facts | changes))
    refused(run("inspect", model), message)
    refused(run("prune", model, "--output", tmp_path / "out", "--width", 8, "--criterion", "ppm"), message)


@pytest.mark.parametrize(
    ("key", "value", "most"), [("n_layer", 0, "1,000"), ("n_embd", 2**30, "1,048,576"), ("n_positions", 0, "1,099")]
)
def test_sizes_by_other_names(key: str, value: int, most: str, tmp_path: Path) -> None:
    facts = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 24, "n_layer": 2, "n_head": 2}
    (tmp_path / "config.json").write_text(json.dumps(facts | {key: value}))
    refused(run("inspect", tmp_path), f"{key} is {value} and should be a whole number from 1 to {most}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "config.json must hold a JSON object, not []; copy it again"),
        (b"{", "config.json is no JSON (Expecting property name"),
        (b"[" * 100_000, "config.json is no JSON (maximum recursion depth exceeded"),
        (b'{"a": ' + b"9" * 5000 + b"}", "config.json is no JSON (Exceeds the limit"),
        (b"\xff\xfe{}", "config.json is not text in UTF-8 (invalid start byte at byte 0); save it as UTF-8"),
    ],
)
def test_configurations_that_are_no_json(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    refused(run("inspect", tmp_path), message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token_id": 9999}, "begin with token 9999, and its vocabulary has 257; correct bos_token_id"),
        ({"bos_token_id": -1}, "begin with token -1, and its vocabulary has 257"),
        ({"bos_token_id": None, "eos_token_id": []}, "the model names no start or end token"),
        ({"bos_token_id": None, "eos_token_id": [300]}, "begin with token 300"),
    ],
)
def test_text_is_sampled_from_a_start_token_of_the_vocabulary(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    dense = shutil.copytree(world / "dense", tmp_path / "dense")
    facts = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(facts | changes))
    monkeypatch.setattr("hifiprune.commands.prepare.Checkpoint.load", None)  # refused before weights load
    words = ("--calibration", "self", "--seq-len", 8, "--num-samples", 2, "--output", tmp_path / "out")
    refused(run("score", dense, *words), message)
    assert not (tmp_path / "out").exists()


DEVICES = [
    "cpu:9",
    "cpu:0",
    "cuda:x",
    "cuda:",
    "cuda:-1",
    "cuda:99999",
    "mps",
    "gpu",
    "",
    "CPU",
    "cuda:\N{ARABIC-INDIC DIGIT THREE}",
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            (("--device", device), f"device '{device}' is not known; use auto, cpu, cuda or cuda:0")
            for device in DEVICES
        ),
        (("--attention", "flash_atention_2"), "is not known; known are eager, flash_attention_4"),
        (("--attention", "flash_atention_2"), "did you mean 'flash_attention_2'?"),
        (("--attention", ""), "attention '' is not known"),
        (("--attention", "kernels-community/flash-attn"), "attention 'kernels-community/flash-attn' is not known"),
        (
            ("--attention", "flash_attention_2", "--device", "cpu"),
            "runs on a GPU only, and the device is cpu; leave out",
        ),
    ],
)
def test_devices_and_attention_are_checked_before_the_work(
    world: Path, made: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    dense, text = world / "dense", world / "calibration.txt"
    sizes = ("--num-samples", 2, "--seq-len", 8)
    for command in (
        ("score", dense, "--output", tmp_path / "out", "--calibration", text, *sizes),
        ("prune", dense, "--output", tmp_path / "out", "--width", 24, "--calibration", text, *sizes),
        ("evaluate", dense, "--text", text, "--seq-len", 8, "--output", tmp_path / "out"),
        ("recover", made / "pruned", "--output", tmp_path / "out", "--data", text, "--max-steps", 1, "--seq-len", 24),
        ("ablate", dense, "--scores", made / "scores", "--text", text, "--seq-len", 8, "--output", tmp_path / "out"),
        ("bench", dense, made / "pruned", "--output", tmp_path / "out"),
    ):
        refused(run(*command, *words), message)
    assert not any(tmp_path.iterdir())


def test_attention_that_needs_a_package() -> None:
    if find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    with pytest.raises(
        hp.UserError, match="'flash_attention_2' needs flash-attn: pip install flash-attn, or leave out"
    ):
        check_attention("flash_attention_2", "cuda:0")


def test_attention_that_the_model_does_not_take(tmp_path: Path, world: Path) -> None:
    bloom = save_checkpoint(tmp_path / "bloom", "bloom")
    words = ("--text", world / "held.txt", "--seq-len", 8, "--attention", "flex_attention")
    refused(run("evaluate", bloom, *words), "bloom does not run with attention 'flex_attention' (")


def test_maps_that_are_not_there_leave_nothing_behind(made: Path, world: Path, tmp_path: Path) -> None:
    words = ("recover", made / "pruned", "--output", tmp_path / "out", "--data", world / "calibration.txt")
    more = ("--max-steps", 1, "--seq-len", 24, "--target-modules")
    refused(run(*words, *more, "q_prj"), "target module 'q_prj' is not known; known are down_proj")
    refused(run(*words, *more, "q_prj"), "did you mean 'q_proj'?")
    for empty in ("", " ", ","):
        refused(run(*words, *more, empty), "target-modules: give at least one, or several separated by commas")
    refused(
        run(*words, "--max-steps", 1, "--seq-len", 24, "--lora-r", 33),
        "lora-r 33 must be at most 32; the smaller side of the largest projection is 24",
    )
    assert not any(tmp_path.iterdir())


def test_names_in_messages_stay_as_they_are() -> None:
    refused(run("inspect", "a:smile:b"), "there is no model folder or .gguf file a:smile:b")


def test_files_that_may_not_be_read(made: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(name: str) -> None:
        def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return open(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", refuse)
        monkeypatch.setattr(Path, "read_text", lambda path, *_, **how: refuse(path, **how).read())

    recover = ("recover", made / "pruned", "--output", tmp_path / "out", "--data", world / "calibration.txt")
    for name, words in (
        ("run.json", ("inspect", made / "pruned")),
        ("run.json", (*recover, "--seq-len", 24, "--max-steps", 1)),
        ("run.json", ("report", made / "pruned", "--output", tmp_path / "r.html")),
        ("plan.json", ("report", made / "pruned", "--output", tmp_path / "r.html")),
        ("config.json", ("inspect", made / "pruned")),
    ):
        with monkeypatch.context():
            forbid(name)
            refused(run(*words), f"{name} cannot be read: Permission denied")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "locked/adapter_config.json")

    monkeypatch.setattr("hifiprune.commands.inspect.find_checkpoint", refuse)
    refused(run("inspect", "locked"), "locked/adapter_config.json: Permission denied; check that it is there, and that")


def test_weights_of_a_layer_that_the_configuration_does_not_count(world: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(world / "dense", tmp_path / "dense")
    facts = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(facts | {"num_hidden_layers": 2}))
    message = "model.layers.2.input_layernorm.weight, of a layer that its configuration does not count: num_hidden"
    refused(run("inspect", dense), message)
    refused(run("prune", dense, "--output", tmp_path / "out", "--width", 24, "--criterion", "ppm"), message)


def test_a_model_with_nan_is_not_timed(world: Path, made: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(world / "dense", tmp_path / "dense")
    tensors = load_file(dense / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, dense / "model.safetensors", {"format": "pt"})
    words = ("bench", dense, made / "pruned", "--lengths", 8, "--new-tokens", 2)
    refused(run(*words), "the weights model.norm.weight contain NaN or infinite values")


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_settings_that_are_no_objects(world: Path, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "dense", model)
    (model / name).write_text("[]")
    words = ("--calibration", world / "calibration.txt", "--num-samples", 2, "--seq-len", 16)
    refused(run("score", model, "--output", tmp_path / "s", *words), f"{name} must hold a JSON object, not []")


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("tokenizer_config.json", ("eos_token",), 5),
        ("tokenizer_config.json", ("added_tokens_decoder",), [1]),
        ("tokenizer_config.json", ("added_tokens_decoder", "x"), {"content": "a"}),
        ("special_tokens_map.json", ("pad_token",), [[]]),
        ("tokenizer.json", ("normalizer", "type"), "frob"),
    ],
)
def test_the_key_of_a_tokenizers_files_is_named(
    world: Path, tmp_path: Path, file: str, path: tuple[str, ...], value: object
) -> None:
    dense = shutil.copytree(world / "dense", tmp_path / "dense")
    facts = json.loads((dense / file).read_text()) if (dense / file).exists() else {}
    part = facts
    for key in path[:-1]:
        part[key] = part = part.get(key) or {}
    part[path[-1]] = value
    (dense / file).write_text(json.dumps(facts))
    before = {each.name: each.read_bytes() for each in dense.iterdir()}
    words = ("--output", tmp_path / "out", "--calibration", world / "calibration.txt", "--seq-len", 8)
    refused(run("score", dense, *words), f"cannot be read: in {file}, {path[0]}")
    assert {each.name: each.read_bytes() for each in dense.iterdir()} == before


def test_settings_of_generation_that_transformers_refuses(world: Path, tmp_path: Path) -> None:
    dense = shutil.copytree(world / "dense", tmp_path / "dense")
    (dense / "generation_config.json").write_text('{"cache_implementation": "frob"}')
    words = ("--output", tmp_path / "out", "--width", 24, "--round-to", 1, "--criterion", "magnitude")
    refused(run("prune", dense, *words), f"generation_config.json of {dense} cannot be read: Invalid `cache_impl")


def test_an_index_that_nests_too_deeply(world: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world / "dense", model)
    (model / "model.safetensors.index.json").write_text("[" * 100_000)
    refused(run("inspect", model), "model.safetensors.index.json is damaged (maximum recursion depth exceeded")
