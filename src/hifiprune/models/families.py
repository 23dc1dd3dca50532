"""The table of supported architectures: one row of data each that says where its MLPs are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hifiprune.errors import UserError, nearest_name


@dataclass(frozen=True)
class Family:
    """Module paths of an architecture; those of the MLP are relative to a block, those of its projections to the MLP.

    Attributes:
        blocks: the decoder blocks.
        norm: the last norm, after them.
        mlp: the MLP of a block; empty if its projections are direct children of the block.
        inputs: input projections (gate and up); a projection that fuses both is named twice.
        output: output projection (down).
        width: configuration key of the MLP width; may be missing or None, which means four times the hidden size.
        additive: whether the MLP's output is added to the residual stream without a norm or factor in between.
        returns_tuple: whether blocks return a tuple whose first item is the hidden state.
        experts: module that stacks the experts' projections `gate_up_proj` and `down_proj`, if a block has experts.
        expert_width: configuration key of the experts' width.
        shared: MLP beside the experts that processes every token.
        shared_width: configuration keys whose product is its width.
        takes_images: whether the model also takes images; its vision tower is not changed.
        stored: name prefixes in the model, or parts after a dot, mapped to those in files.
        stored_experts: names of an expert's input and output projections in files that store each expert by itself.
        separates_packed: whether blocks separate examples packed into one row by their position ids.
        models: well-known models of the architecture.
        detected: whether the layout was found by structure, and so must be verified on the weights.
    """

    blocks: str = "model.layers"
    norm: str = "model.norm"
    mlp: str = "mlp"
    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    width: str = "intermediate_size"
    additive: bool = True
    returns_tuple: bool = False
    experts: str = ""
    expert_width: str = "moe_intermediate_size"
    shared: str = ""
    shared_width: tuple[str, ...] = ()
    takes_images: bool = False
    stored: tuple[tuple[str, str], ...] = ()
    stored_experts: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    separates_packed: bool = True
    models: str = ""
    detected: bool = False

    @property
    def projections(self) -> list[str]:
        """Return the paths of the MLP's projections, the output one last, with a placeholder for the block index."""
        names = [*dict.fromkeys(self.inputs), self.output]
        return [".".join(filter(None, (self.blocks, "{}", self.mlp, name))) for name in names]

    @property
    def one_width_reason(self) -> str:
        """Return why all MLPs must share one width; empty if widths may differ."""
        if self.experts:
            return "experts have one width, which the configuration states for all"
        return "vision-language models are saved with one width" if self.takes_images else ""

    def in_model(self, name: str) -> str:
        """Map a tensor's name in a file to its name in the model."""
        if any(_holds(name, ours) for ours, _ in self.stored):
            return name
        found = next(((ours, theirs) for ours, theirs in self.stored if _holds(name, theirs)), None)
        return name.replace(found[1], found[0], 1) if found else name

    def in_files(self, name: str) -> str:
        """Map a tensor's name in the model to its name in files."""
        found = next(((ours, theirs) for ours, theirs in self.stored if _holds(name, ours)), None)
        return name.replace(*found, 1) if found else name


def _holds(name: str, part: str) -> bool:
    return part in name if part.startswith(".") else name.startswith(part)


FUSED = ("gate_up_proj", "gate_up_proj")
GPT = Family("transformer.h", "transformer.ln_f", width="n_inner")
SHARED = Family(experts="experts", shared="shared_experts", shared_width=("moe_intermediate_size", "n_shared_experts"))
SEEING = Family("model.language_model.layers", "model.language_model.norm", takes_images=True)
QWEN_VL = replace(
    SEEING, separates_packed=False, stored=(("model.visual.", "visual."), ("model.language_model.", "model."))
)
TOWER = replace(
    SEEING,
    stored=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
)
ALIBI = replace(GPT, inputs=("dense_h_to_4h",), output="dense_4h_to_h", returns_tuple=True, separates_packed=False)
FAMILIES: dict[str, Family] = {
    "arcee": Family(inputs=("up_proj",), models="Arcee AFM"),
    "bloom": replace(
        GPT,
        inputs=("dense_h_to_4h",),
        output="dense_4h_to_h",
        width="",
        returns_tuple=True,
        separates_packed=False,
        models="BLOOM",
    ),
    "codegen": replace(GPT, inputs=("fc_in",), output="fc_out", returns_tuple=True, models="CodeGen"),
    "cohere": Family(models="Command R, Aya"),
    "cohere2": Family(models="Command A, Command R7B"),
    "deepseek_v2": replace(SHARED, models="DeepSeek-V2, V2-Lite"),
    "deepseek_v3": replace(SHARED, models="DeepSeek-V3, R1 (in bfloat16)"),
    "ernie4_5": Family(models="ERNIE 4.5 (dense)"),
    "exaone4": Family(additive=False, models="EXAONE 4"),
    "falcon": replace(ALIBI, width="ffn_hidden_size", models="Falcon"),
    "gemma": Family(models="Gemma"),
    "gemma2": Family(additive=False, models="Gemma 2"),
    "gemma3": replace(TOWER, additive=False, models="Gemma 3 (with images)"),
    "gemma3_text": Family(additive=False, models="Gemma 3 (text)"),
    "glm": Family(inputs=FUSED, models="GLM-4 9B"),
    "glm4": Family(inputs=FUSED, additive=False, models="GLM-4-0414"),
    "glm4_moe": replace(SHARED, models="GLM-4.5, GLM-4.5-Air"),
    "gpt2": replace(GPT, inputs=("c_fc",), output="c_proj", models="GPT-2, DistilGPT-2"),
    "gpt_bigcode": replace(GPT, inputs=("c_fc",), output="c_proj", models="StarCoder"),
    "gpt_neox": Family(
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        inputs=("dense_h_to_4h",),
        output="dense_4h_to_h",
        stored=(("lm_head.", "embed_out."),),
        models="GPT-NeoX, Pythia",
    ),
    "gptj": replace(GPT, inputs=("fc_in",), output="fc_out", returns_tuple=True, models="GPT-J"),
    "granite": Family(additive=False, models="Granite 3 (dense)"),
    "helium": Family(models="Helium"),
    "hunyuan_v1_dense": Family(models="Hunyuan (dense)"),
    "internvl": replace(TOWER, models="InternVL3 (on Qwen 2.5)"),
    "llama": Family(models="Llama 1 to 3, SmolLM, SmolLM2, Yi, DeepSeek LLM"),
    "llava": replace(TOWER, models="LLaVA 1.5 (on Llama)"),
    "ministral": Family(models="Ministral"),
    "ministral3": Family(models="Ministral 3 (text)"),
    "mistral": Family(models="Mistral 7B, Mistral Nemo, Mistral Small (text)"),
    "mistral3": replace(TOWER, models="Mistral Small 3.1, 3.2 (with images)"),
    "mixtral": Family(
        experts="experts",
        expert_width="intermediate_size",
        stored=((".mlp.", ".block_sparse_moe."),),
        stored_experts=("w1", "w3", "w2"),
        models="Mixtral",
    ),
    "nemotron": Family(inputs=("up_proj",), models="Nemotron 4, Minitron"),
    "olmo": Family(models="OLMo"),
    "olmo2": Family(additive=False, models="OLMo 2"),
    "olmo3": Family(additive=False, models="OLMo 3"),
    "olmoe": Family(experts="experts", expert_width="intermediate_size", models="OLMoE"),
    "opt": Family(
        "model.decoder.layers",
        "model.decoder.final_layer_norm",
        "",
        inputs=("fc1",),
        output="fc2",
        width="ffn_dim",
        separates_packed=False,
        models="OPT",
    ),
    "phi": Family(norm="model.final_layernorm", inputs=("fc1",), output="fc2", models="Phi-1, Phi-1.5, Phi-2"),
    "phi3": Family(inputs=FUSED, models="Phi-3, Phi-4"),
    "qwen2": Family(models="Qwen 2, Qwen 2.5"),
    "qwen2_5_vl": replace(QWEN_VL, models="Qwen2.5-VL"),
    "qwen2_moe": Family(
        experts="experts",
        shared="shared_expert",
        shared_width=("shared_expert_intermediate_size",),
        models="Qwen1.5-MoE, Qwen2-57B-A14B",
    ),
    "qwen2_vl": replace(QWEN_VL, models="Qwen2-VL"),
    "qwen3": Family(models="Qwen 3"),
    "qwen3_moe": Family(experts="experts", models="Qwen3-30B-A3B, Qwen3-235B-A22B"),
    "qwen3_vl": replace(SEEING, models="Qwen3-VL"),
    "seed_oss": Family(models="Seed-OSS"),
    "smollm3": Family(models="SmolLM3"),
    "smolvlm": Family("model.text_model.layers", "model.text_model.norm", takes_images=True, models="SmolVLM"),
    "stablelm": Family(models="StableLM"),
    "starcoder2": Family(inputs=("c_fc",), output="c_proj", models="StarCoder2"),
}


def known_family(model_type: str, architectures: Sequence[str] | None = None) -> Family:
    """Return the layout of an architecture of the table, or refuse it by name.

    Raises:
        UserError: the model type is not in the table.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    found = f" ({', '.join(architectures)})" if architectures else ""
    raise UserError(
        f"model type '{model_type}'{found} is not supported; "
        f"supported are {', '.join(sorted(FAMILIES))}{nearest_name(model_type, FAMILIES)}"
    )
