"""What is said about inference engines: rules against independent truth, on tiny checkpoints, and as told."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hifiprune import cut_, inspect
from hifiprune.deployment.compatibility import TENSOR_PARALLEL, Facts, answer, remark_on_mixed
from hifiprune.deployment.engines import BLOCKS, ENGINES, FORMS, KEYS, SUPPORT, Form
from hifiprune.io.json_files import to_plain
from hifiprune.models.detect import stock_class
from hifiprune.models.families import FAMILIES
from hifiprune.models.mlp import find_mlps
from hifiprune.pruning.cut_checkpoint import cut_checkpoint
from tests import engines
from tests.commands import refused, run
from tests.families import tiny_model
from tests.published import PUBLISHED, publish
from tests.test_families import plan_keeping, random_plan

ROOT = Path(__file__).parent.parent
LLAMA = Facts("llama", (1024,), hidden=1024, heads=8, key_heads=8, head=128)
Answers = dict[tuple[str, str], dict[str, Any]]


def form_of(engine: str, start: str) -> Form:
    return next(form for form in FORMS if form.engine == engine and form.name.startswith(start))


def answers_of(folder: Path) -> Answers:
    return {(row["engine"], row["form"]): row for row in to_plain(inspect(str(folder), deploy=True))["deployment"]}


def whys(folder: Path, engine: str) -> set[tuple[str, str]]:
    """Verdicts and reasons of one engine."""
    return {(row["verdict"], row["why"]) for (name, _), row in answers_of(folder).items() if name == engine}


def save_pruned(folder: Path, variant: str, width: int | None = 24, **options: Any) -> Path:
    """A tiny checkpoint, cut if a width is given."""
    model = tiny_model(variant, torch.float32, **options)
    model.save_pretrained(folder)
    if width:
        model = AutoModelForCausalLM.from_pretrained(folder)
        cut_(model, random_plan(model, width))
        model.save_pretrained(folder)
    return folder


def whole_groups(row: int, gpus: int, group: int) -> bool:
    """Whether places 0, 1, ... of a row, dealt out evenly in turn, make whole groups on every GPU."""
    if row % gpus:
        return False
    share = row // gpus
    shares = [range(gpu * share, (gpu + 1) * share) for gpu in range(gpus)]
    groups = [own[start : start + group] for own in shares for start in range(0, share, group)]
    return all(len(each) == group for each in groups)


@pytest.mark.parametrize("form", [form for form in FORMS if form.multiple > 1], ids=lambda form: form.name)
def test_widths_are_taken_where_every_group_is_whole(form: Form) -> None:
    found = {"yes": 0, form.otherwise: 0}
    for width in range(8, 2049, 8):
        told = answer(replace(LLAMA, widths=(width,)), form)
        gpus = TENSOR_PARALLEL if ENGINES[form.engine].splits else (1,)
        fitting = [size for size in gpus if whole_groups(width, size, form.multiple)]
        assert (told.verdict == "yes") == bool(fitting), width
        assert told.verdict in ("yes", form.otherwise)
        if told.verdict == "yes" and len(gpus) > 1:
            assert list(told.tensor_parallel) == fitting, width
        if told.verdict != "yes":
            assert f"MLP width {width:,} is not a multiple of {form.multiple}" in told.why
        found[told.verdict] += 1
    assert all(found.values()), "both happen"


def test_sixteen_bits_need_no_groups_but_even_shares() -> None:
    for engine, name in (("vllm", "16 bits"), ("tensorrt-llm", "16 bits"), ("sglang", "16 bits")):
        for width in range(1, 300):
            told = answer(replace(LLAMA, widths=(width,)), form_of(engine, name))
            assert told.verdict == "yes"
            assert [*told.tensor_parallel] == [gpus for gpus in (1, 2, 4, 8) if math.gcd(width, gpus) == gpus]
    nine = replace(LLAMA, heads=9, key_heads=3, head=64)
    assert answer(nine, form_of("vllm", "16 bits")).tensor_parallel == (1,), "nine heads cannot be shared by two"


def test_other_maps_than_the_mlps_count_too() -> None:
    odd = replace(LLAMA, hidden=576, heads=9, key_heads=3, head=64)
    why = answer(odd, form_of("vllm", "int4")).why
    assert why.startswith("hidden size 576 and attention width 576 are not multiples of 128")
    why = answer(odd, form_of("sglang", "FP8, blocks")).why
    assert why.startswith("query width 576 and key width 192 are not multiples of 128")
    assert answer(odd, form_of("vllm", "FP8, one scale")).verdict == "yes"
    told = answer(replace(odd, widths=(1000,)), form_of("llama.cpp", "k-quants"))
    assert (told.verdict, "f16 for MLP width" in told.why) == ("partly", True), "1,000 is not 32 x 31.25, but 576 is"


def test_blocks_on_one_gpu_matter_behind_a_gate_only() -> None:
    form, odd = form_of("vllm", BLOCKS), replace(LLAMA, widths=(1000,))
    assert answer(odd, form).verdict == "no"
    told = answer(replace(odd, gated=False), form)
    assert (told.verdict, told.tensor_parallel) == ("yes", (1,))


def test_blocks_of_gguf_are_those_of_its_library() -> None:
    def sizes(*names: str) -> set[int]:
        return {gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0] for name in names}

    assert sizes("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL") == {form_of("llama.cpp", "q4_0").multiple}
    assert sizes("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K") == {form_of("llama.cpp", "k-quants").multiple}
    assert sizes("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ3_S", "IQ4_XS") == {form_of("llama.cpp", "i-quants").multiple}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_row_and_backends_run_what_transformers_lets_them(name: str) -> None:
    model: Any = stock_class(AutoConfig.for_model(name))
    support = dict(zip(ENGINES, SUPPORT[name], strict=True))
    if "backend" in (support["vllm"], support["sglang"]):
        assert model.is_backend_compatible()
    if "no" in (support["vllm"], support["sglang"]):
        assert not model.is_backend_compatible(), "the Transformers backend would run it"


def test_rules_are_complete_and_name_their_sources() -> None:
    kinds = {"vllm": {"autodeploy"}, "sglang": {"autodeploy"}, "mlx": {"autodeploy", "backend"}}
    kinds |= {"tensorrt-llm": {"backend", "fixed"}, "llama.cpp": {"autodeploy", "backend"}}
    for name, row in SUPPORT.items():
        assert len(row) == len(ENGINES), name
        for engine, kind in zip(ENGINES, row, strict=True):
            assert kind in {"yes", "backend", "fixed", "no", "unknown", "autodeploy"} - kinds[engine], (name, engine)
            assert kind != "fixed" or ENGINES[engine].fixed, (name, engine)
    assert {form.engine for form in FORMS} == {*ENGINES}
    assert all(form.source for form in FORMS if form.multiple > 1)
    assert {*KEYS} < {*ENGINES}
    for key, types in KEYS.items():
        told = {name for name, row in SUPPORT.items() if row[[*ENGINES].index(key)] in ("yes", "fixed")}
        assert {*types} <= told, key


def test_a_type_without_a_row_is_not_known() -> None:
    for form in FORMS:
        told = answer(replace(LLAMA, model_type="new"), form)
        assert (told.verdict, told.why) == ("unknown", "nothing is known about model type 'new'")


FIXED = "hard-codes an MLP width of 4 x hidden size = 96 for model type '{}', this checkpoint has 24"


@pytest.mark.parametrize(
    ("variant", "engine", "why"),
    [
        ("codegen", "vLLM", "has no implementation of model type 'codegen'"),
        ("helium", "llama.cpp", "has no implementation of model type 'helium'"),
        ("falcon", "vLLM", FIXED.format("falcon")),
        ("phi", "SGLang", FIXED.format("phi")),
        ("gptj", "MLX (mlx-lm)", FIXED.format("gptj")),
        (
            "gpt2",
            "llama.cpp",
            FIXED.format("gpt2") + "; after the conversion, set feed_forward_length to 24 in the file with "
            "gguf_set_metadata",
        ),
    ],
)
def test_refusals_of_pruned_models(variant: str, engine: str, why: str, tmp_path: Path) -> None:
    assert whys(save_pruned(tmp_path, variant), engine) == {("no", why)}


@pytest.mark.parametrize(("variant", "engine"), [("falcon", "vLLM"), ("phi", "llama.cpp"), ("phi", "SGLang")])
def test_a_dense_model_of_the_usual_width_is_not_refused(variant: str, engine: str, tmp_path: Path) -> None:
    save_pruned(tmp_path, variant, width=None, intermediate_size=96)
    assert "yes" in {verdict for verdict, _ in whys(tmp_path, engine)}


@pytest.mark.parametrize("variant", ["llama", "bloom"])
def test_own_code_runs_through_transformers_backends_alone(variant: str, tmp_path: Path) -> None:
    model = tiny_model(variant, torch.float32)
    kept = [torch.arange(width) for width in ((7, 40, 23) if variant == "llama" else (16, 16, 16))]
    cut_(model, plan_keeping(model, kept))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {*saved["auto_map"]} == {"AutoModel", "AutoModelForCausalLM"}, "vLLM and SGLang ask for the first"
    assert saved["architectures"][0].startswith("Pruned")
    for engine in ENGINES.values():
        row = next(row for (name, _), row in answers_of(tmp_path).items() if name == engine.name)
        told = (engine.mixed, engine.why)
        if variant == "bloom" and engine.mixed == "yes":
            told = ("no", "its Transformers backend does not take models of type 'bloom'")
        if variant == "llama" and engine.name == "llama.cpp":
            told = ("yes", "as architecture deci, by hifiprune export")
        assert (row["verdict"], row["why"]) == told
        assert (engine.deci if "export" in told[1] else engine.code) in row["sources"]
    assert "vLLM, TensorRT-LLM, SGLang, MLX (mlx-lm) and llama.cpp have an implementation" in remark_on_mixed()


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_deci_runs_where_it_is_implemented(variant: str, tmp_path: Path) -> None:
    tiny_model(variant, torch.float32, intermediate_size=768, head_dim=6).save_pretrained(tmp_path / "dense")
    model = tiny_model(variant, intermediate_size=768, head_dim=6)
    plan = plan_keeping(model, [torch.arange(width) for width in (256, 768, 512)])
    cut_checkpoint(str(tmp_path / "dense"), tmp_path / "cut", plan)
    for engine in ENGINES.values():
        rows = [row for (name, _), row in answers_of(tmp_path / "cut").items() if name == engine.name]
        runs = not (variant == "qwen2" and engine.name == "TensorRT-LLM")
        assert rows[0]["verdict"] == ("yes" if runs else "no"), engine.name
        assert rows[0]["sources"][0] == engine.deci
        if variant == "qwen2" and engine.name == "TensorRT-LLM":
            assert "has no biases in attention" in rows[0]["why"]
        assert not [row["why"] for row in rows if "MLP width" in row["why"]], "all are multiples of 256"


ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 5e5}


def test_angles_that_an_engine_would_not_find(tmp_path: Path) -> None:
    save_pruned(tmp_path, "llama", rope_parameters=ROPE)
    ((verdict, why),) = whys(tmp_path, "MLX (mlx-lm)")
    assert verdict == "no"
    assert why.endswith('silently assumes 10000 if it is missing; add "rope_theta": 500000.0')
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"rope_theta": 500000.0}))
    assert ("yes", "") in whys(tmp_path, "MLX (mlx-lm)")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.rope_parameters["rope_theta"] == 5e5, "transformers reads the mended file as before"


def test_what_prune_writes_is_taken_where_the_dense_model_is(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_checkpoint(rope_parameters=ROPE)
    facts = json.loads((dense / "config.json").read_text())
    assert "rope_theta" not in facts, "transformers 5 writes it elsewhere"
    for name, more, verdict in (("new", {}, "no"), ("old", {"rope_theta": 5e5}, "yes")):
        (dense / "config.json").write_text(json.dumps(facts | more))
        cut_checkpoint(str(dense), tmp_path / name, random_plan(AutoModelForCausalLM.from_pretrained(dense), 24))
        assert json.loads((tmp_path / name / "config.json").read_text()) == facts | more | {"intermediate_size": 24}
        assert AutoConfig.from_pretrained(tmp_path / name).rope_parameters["rope_theta"] == 5e5
        for folder in (dense, tmp_path / name):
            assert verdict in {told for told, _ in whys(folder, "MLX (mlx-lm)")}


@pytest.mark.parametrize(
    ("name", "lost", "why"),
    [
        (
            "mistral3",
            "text_config.rope_theta",
            "reads rope_theta in text_config of config.json and silently assumes 10000 if it is missing; "
            'add "rope_theta": 1000000000.0',
        ),
        (
            "gemma3",
            "text_config.rope_local_base_freq",
            "reads rope_local_base_freq in text_config of config.json and silently assumes 10000 if it is missing; "
            'add "rope_local_base_freq": 20000.0',
        ),
        (
            "qwen2_vl",
            "tie_word_embeddings",
            "reads tie_word_embeddings at the top level of config.json and silently assumes true if it is missing; "
            'add "tie_word_embeddings": false',
        ),
        (
            "qwen3_moe",
            "num_experts",
            "reads num_experts at the top level of config.json and fails or gives wrong results without it; "
            'add "num_experts": 4',
        ),
        (
            "cohere2",
            "sliding_window_pattern",
            "reads sliding_window_pattern at the top level of config.json and silently assumes 4 if it is missing; "
            'add "sliding_window_pattern": 2',
        ),
    ],
)
def test_published_files_are_taken_and_those_that_lack_a_key_are_not(
    name: str, lost: str, why: str, tmp_path: Path
) -> None:
    facts = json.loads(json.dumps(PUBLISHED[name]))
    facts |= {"sliding_window_pattern": 2, "layer_switch": 2} if name == "cohere2" else {}
    facts |= {"tie_word_embeddings": False} if name == "qwen2_vl" else {}
    assert {verdict for verdict, _ in whys(publish(tmp_path / "published", facts), "MLX (mlx-lm)")} <= {"yes", "partly"}
    again = AutoConfig.from_pretrained(tmp_path / "published")
    again.save_pretrained(tmp_path / "published")  # as transformers 5 writes it
    rewritten = json.loads((tmp_path / "published" / "config.json").read_text())
    place, _, key = lost.rpartition(".")
    section = rewritten[place] if place else rewritten.get("text_config", rewritten)
    assert key not in section
    told = {key: value for key, value in (facts[place] if place else facts).items() if key not in section}
    del told[key]
    section |= told
    if "text_config" in rewritten and not place:
        why = why.replace("at the top level", "in text_config")
    (tmp_path / "published" / "config.json").write_text(json.dumps(rewritten))
    assert whys(tmp_path / "published", "MLX (mlx-lm)") == {("no", why)}


def test_angles_that_an_engine_takes_unasked(tmp_path: Path) -> None:
    for variant, theta in (("llama", 1e4), ("qwen3", 5e5)):
        save_pruned(tmp_path / variant, variant, rope_parameters=ROPE | {"rope_theta": theta})
        assert ("yes", "") in whys(tmp_path / variant, "MLX (mlx-lm)")


def test_scaled_angles_are_missed_too(tmp_path: Path) -> None:
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ((verdict, why),) = whys(save_pruned(tmp_path, "llama", rope_parameters=scaled), "MLX (mlx-lm)")
    assert (verdict, '"rope_scaling": {' in why) == ("no", True)


@pytest.mark.parametrize(("variant", "share", "stated"), [("gpt_neox", 0.5, 0.5), ("cohere2", None, 1.0)])
def test_keys_that_the_converter_needs(variant: str, share: float | None, stated: float, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4} | ({"partial_rotary_factor": share} if share else {})
    ((verdict, why),) = whys(save_pruned(tmp_path, variant, rope_parameters=rope), "llama.cpp")
    assert (verdict, why.rpartition("; ")[2]) == ("no", f'add "rotary_pct": {stated}')
    facts = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"rotary_pct": stated}))
    assert ("yes", "") in whys(tmp_path, "llama.cpp")
    assert "no" not in {verdict for verdict, _ in whys(save_pruned(tmp_path / "usual", "gpt_neox"), "llama.cpp")}


def test_the_command_tells_it_and_what_to_do_next(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    dense = make_checkpoint(intermediate_size=512)
    for width, words in ((300, "--round-to 256"), (256, f"push {tmp_path / '256'} OWNER/NAME")):
        output = tmp_path / str(width)
        assert run("prune", dense, "--output", output, "--width", width, "--criterion", "magnitude").code == 0
        told = run("inspect", output, "--deploy")
        assert told.code == 0, told.err
        assert words in told.out[told.out.rindex("Next: hifiprune") :]
    assert "4 attention heads" in told.out
    assert "k-quants" in told.out
    assert "Next: hifiprune prune" in run("inspect", dense, "--deploy").out
    facts = run("inspect", output, "--deploy", "--json").json
    assert facts == to_plain(inspect(str(output), deploy=True))
    assert len(facts["deployment"]) == len(FORMS)
    for row in facts["deployment"]:
        assert [*row] == ["engine", "version", "form", "verdict", "why", "tensor_parallel", "sources"]
        assert row["verdict"] in ("yes", "partly", "no", "unknown")
        assert row["why"] or row["verdict"] == "yes"
        assert row["sources"]
        assert all(source.startswith("https://") for source in row["sources"])
    assert "deployment" not in run("inspect", output, "--json").json


def test_mixed_widths_are_told_what_to_do(tmp_path: Path, world: Path) -> None:
    text = ("--calibration", world / "calibration.txt", "--num-samples", 2, "--seq-len", 16)
    output = tmp_path / "mixed"
    made = run("prune", world / "dense", "--output", output, "--width", 24, "--allocation", "global", *text)
    assert made.code == 0, made.err
    assert "k-quants" not in made.err
    assert len({mlp.neurons for mlp in find_mlps(tiny_skeleton(output))}) > 1
    told = run("inspect", output, "--deploy")
    assert told.code == 0
    assert "--allocation uniform" in told.out[told.out.rindex("Next:") :]


def tiny_skeleton(folder: Path) -> Any:
    from hifiprune.models.checkpoint import Checkpoint

    return Checkpoint("pruned", folder).skeleton()


def test_what_the_command_refuses(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(
        run("inspect", tmp_path / "model.gguf", "--deploy"), "is a GGUF file: inspect the folder that it was made from"
    )
    refused(run("inspect", tmp_path / "none", "--deploy"), "there is no model folder")
    facts = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(facts | {"model_type": "mamba"}))
    refused(run("inspect", checkpoint, "--deploy"), "model type 'mamba'")


@pytest.mark.parametrize(
    ("dense", "options", "remark"),
    [
        (1024, ("--width", 700), "Width 700 is not a multiple of 256: llama.cpp's k-quants use fallback types for "
         "the down projections; --width 512 avoids that."),
        (1024, ("--neuron-ratio", 0.37), "Width 640 is not a multiple of 256: llama.cpp's k-quants use fallback "
         "types for the down projections; --round-to 256 avoids that."),
        (512, ("--width", 200), "Width 200 is not a multiple of 256: llama.cpp's k-quants use fallback types for "
         "the down projections."),
        (1024, ("--width", 768), ""),
        (1024, ("--neuron-ratio", 0.37, "--round-to", 256), ""),
        (1000, ("--width", 700), ""),
    ],
)  # fmt: skip
def test_prune_says_before_where_k_quants_are_lost(
    dense: int, options: tuple[object, ...], remark: str, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = make_checkpoint(intermediate_size=dense)
    told = run("prune", model, "--output", tmp_path / "o", "--criterion", "magnitude", "--dry-run", *options)
    assert told.code == 0, told.err
    assert told.err.count("k-quants") == bool(remark)
    assert remark in told.err


def test_the_page_shows_the_rules() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    for title, table in engines.TABLES.items():
        assert f"## {title}\n" in page
        assert table() in page, title


def test_the_page_shows_what_is_printed_in_80_columns(
    smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = json.loads((smollm2_folder / "config.json").read_text())
    stated = {"intermediate_size": 1024, "rope_theta": facts["rope_parameters"]["rope_theta"]}  # as prune writes it
    (tmp_path / "config.json").write_text(json.dumps(facts | stated))
    monkeypatch.setenv("COLUMNS", "80")
    lines = [line.rstrip() for line in run("inspect", tmp_path, "--deploy").out.splitlines()]
    lines = lines[: next(number for number, line in enumerate(lines) if line.startswith("Next:"))]
    assert "\n".join(lines).strip() in (ROOT / "docs" / "deployment.md").read_text()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 30, "one screen"


def test_the_table_has_a_line_an_engine_and_every_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    save_pruned(tmp_path, "llama", rope_theta=1e4)
    printed = run("inspect", tmp_path, "--deploy").out
    answers = answers_of(tmp_path)
    reasons = dict(re.findall(r"^\[(\d+)\] (.*)$", printed, re.MULTILINE))
    assert {row["why"] for row in answers.values() if row["why"]} == {*reasons.values()}, "each reason once"
    for engine in ENGINES.values():
        (line,) = (line for line in printed.splitlines() if line.strip().startswith(f"{engine.name} {engine.version}"))
        for form in FORMS:
            if ENGINES[form.engine] is engine:
                row = answers[engine.name, form.name]
                number = next((number for number, why in reasons.items() if why == row["why"]), None)
                cells = line if row["verdict"] == "yes" else line.partition(f"{row['verdict']}: ")[2]
                assert f"{form.short}" + (f" [{number}]" if number else "") in cells, (engine.name, form.name)


def test_rules_are_what_the_readers_did() -> None:
    """What was run (`make test-readers`) says the same as what was read in the engines' source."""
    facts = json.loads((ROOT / "benchmarks" / "results" / "readers.json").read_text())
    tiny = {("gemma3", "mlx"): "262208", ("phi3", "llama.cpp"): "tokenizer.model"}  # what these tiny models lack
    assert len(facts) == 15
    for name, answers in facts.items():
        assert len(answers) == 4
        assert not any(answer.get("failed") or answer.get("different_tensors") for answer in answers.values())
        for key, reader in (("mlx", "mlx-lm 0.32.2"), ("llama.cpp", "llama.cpp's converter")):
            refusal = answers[reader].get("refused", "")
            if (name, key) in tiny:
                assert tiny[name, key] in refusal
            elif name in SUPPORT:
                assert dict(zip(ENGINES, SUPPORT[name], strict=True))[key] == ("no" if refusal else "yes"), name


@pytest.mark.parametrize(
    ("name", "engine", "key", "stated"),
    [
        ("llava", "MLX (mlx-lm)", "hidden_size", 24),
        ("internvl", "llama.cpp", "architectures", ["Qwen2ForCausalLM"]),
    ],
)
def test_keys_that_the_text_model_leaves_out(name: str, engine: str, key: str, stated: Any, tmp_path: Path) -> None:
    save_pruned(tmp_path, name, width=None)
    (tmp_path / "model.safetensors").unlink()  # the configuration alone tells
    facts = json.loads((tmp_path / "config.json").read_text())
    part = facts["text_config"] | {"rope_theta": 1e4, "architectures": ["Qwen2ForCausalLM"]}
    assert part.get(key) == stated
    (tmp_path / "config.json").write_text(json.dumps(facts | {"text_config": part}))
    assert "yes" in {verdict for verdict, _ in whys(tmp_path, engine)}
    facts["text_config"] = {k: value for k, value in part.items() if k != key}
    if key == "hidden_size":
        facts["text_config"]["num_attention_heads"] = 32  # of Llama's default hidden size
    (tmp_path / "config.json").write_text(json.dumps(facts))
    ((verdict, why),) = whys(tmp_path, engine)
    assert verdict == "no"
    assert f"reads {key} in text_config" in why
    assert f'add "{key}": ' in why
