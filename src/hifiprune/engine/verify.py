"""Proof, on a model's own weights, that its head and a layout that was found by its shapes are what they seem."""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hifiprune.engine.block_chain import BlockChain
from hifiprune.engine.hooks import BlockCall, eager_experts, overridden, overrides_on
from hifiprune.engine.offload import embedding_rows_loaded, head_rows_loaded
from hifiprune.errors import RunError, UserError
from hifiprune.models.detect import family_of
from hifiprune.models.edit import keep_, others, state_sizes
from hifiprune.models.families import Family
from hifiprune.models.mlp import Mlp, find_blocks
from hifiprune.models.neuron_slices import parameter_slices

TOKENS, TOLERANCE = 8, 0.02


def verified_chain(model: PreTrainedModel) -> BlockChain:
    """Return the block chain of a model, verified on its weights to compute what the model's own forward does.

    Raises:
        UserError: the architecture is not supported, or its logits cannot be rebuilt from the final hidden state.
    """
    family = family_of(model.config)
    chain = BlockChain(model, with_block_outputs(family, model) if family.detected else family)
    verify_head(chain)
    if family.detected:
        verify_layout(chain)
    return chain


def verify_head(chain: BlockChain) -> None:
    """Prove on a few tokens that the logits follow from the final hidden state as `Head` says."""
    tokens = torch.arange(TOKENS, device=chain.model.device).unsqueeze(0) % chain.head.vocabulary
    whole = (lambda hidden: (hidden,)) if chain.family.returns_tuple else (lambda hidden: hidden)
    skipped = [(block, lambda hidden, *args, **kwargs: whole(hidden)) for block in chain.blocks if chain.shelf]
    hidden = chain.norm(chain.embed(tokens)[0])[0] if chain.shelf else chain.final_hidden(tokens)[0]
    ours = chain.head.logits(hidden)
    given = embedding_rows_loaded(chain.model, tokens)
    with (
        torch.no_grad(),
        overridden(skipped),
        eager_experts(chain.model),
        given as numbers,
        head_rows_loaded(chain.model),
    ):
        theirs = chain.model(input_ids=numbers, use_cache=False).logits[0].float()
    ours = ours[:, : theirs.shape[1]]
    if not theirs.isfinite().all():
        raise RunError(f"the logits of {type(chain.model).__name__} are NaN or infinite; check the checkpoint")
    errors = (ours - theirs).abs().amax(1)
    error = (errors.median() if chain.family.experts else errors.max()).item()  # a near tie is routed otherwise
    size = theirs.abs().max().item()
    if not error <= TOLERANCE * size + 1e-4:
        raise UserError(
            f"the logits of {type(chain.model).__name__} cannot be rebuilt from its final hidden state: error "
            f"{error:.3g} where logits reach {size:.3g}; its head has a step that hifiprune does not know"
        )


def with_block_outputs(family: Family, model: PreTrainedModel) -> Family:
    """Return the family with what its blocks return, tuples or tensors, as seen when the model runs."""
    seen: list[bool] = []
    hook = find_blocks(model)[0].register_forward_hook(lambda _, __, output: seen.append(isinstance(output, tuple)))
    try:
        with torch.no_grad():
            model.base_model(input_ids=_tokens(model), use_cache=False)
    finally:
        hook.remove()
    return replace(family, returns_tuple=seen[0])


@torch.no_grad()
def verify_layout(chain: BlockChain) -> None:
    """Cut half of each block's neurons, and see that this does what setting their activations to zero does.

    Raises:
        UserError: it does something else.
    """
    hidden, calls = chain.embed(_tokens(chain.model))
    chance = torch.Generator().manual_seed(0)
    for index, mlp in enumerate(chain.mlps):
        kept = torch.randperm(mlp.neurons, generator=chance)[: max(1, mlp.neurons // 2)].sort().values.to(hidden.device)
        write = partial(_without, mlp, others(kept, mlp.neurons))
        with overridden(overrides_on([mlp], index, hidden, write)):
            masked = chain.run_block(index, hidden, calls[index])
        dense, cut = chain.run_block(index, hidden, calls[index]), _cut(chain, index, hidden, calls[index], kept)
        effect, error = (float((each - masked).abs().max()) for each in (dense, cut))
        if not error <= TOLERANCE * effect:
            seen = f"cutting half of it gives an output {error:.3g} away from that of zeroing the activations"
            raise _refused(chain.model, mlp, f"{seen}, which is {effect:.3g} away from the whole one's")
        hidden = dense


def _without(mlp: Mlp, removed: Tensor, number: int, activation: Tensor, tokens: Tensor | None) -> Tensor:
    return mlp.output(activation.index_fill(-1, removed, 0))


def _cut(chain: BlockChain, index: int, hidden: Tensor, call: BlockCall, kept: Tensor) -> Tensor:
    """Return the output of a block whose MLP is cut for this call."""
    mlp = chain.mlps[index]
    before = [part.parameter.data for part in parameter_slices(mlp)]
    try:
        keep_([mlp], [kept])
        output: Tensor = chain.run_block(index, hidden, call)
    except RuntimeError as error:
        raise _refused(chain.model, mlp, f"cut to {len(kept)} neurons it fails: {error}") from error
    finally:
        for part, values in zip(parameter_slices(mlp), before, strict=True):
            part.set_(values)
        state_sizes(mlp)
    return output


def _tokens(model: PreTrainedModel) -> Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    return torch.arange(TOKENS, device=model.device).unsqueeze(0) % vocabulary


def _refused(model: PreTrainedModel, mlp: Mlp, seen: str) -> UserError:
    return UserError(
        f"model type '{model.config.model_type}' is not in the table of families; {mlp.name} looks like an MLP, but "
        f"{seen}"
    )
