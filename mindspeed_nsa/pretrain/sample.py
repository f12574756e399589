"""A model's own continuation of a text, by whole forward passes: a look at what it learned, not an inference engine."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

from mindspeed_nsa.pretrain.tokenizer import Tokenizer

# Inputs are padded to a multiple of this many tokens, for sequence parallelism to divide. What stands after a token
# cannot change its logits.
_PADDED_TO = 64


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    new_tokens: int,
    temperature: float,
    generator: torch.Generator,
) -> list[int]:
    """Continue a prompt. Every tensor-parallel rank calls it with the same arguments and gets the same ids.

    Args:
        model: a GPTModel, or its wrappers, that holds all layers (no pipeline parallelism).
        tokenizer: gives the end of document and the ids that exist; the model's vocabulary may be padded beyond them.
        prompt_ids: at least one token id.
        new_tokens: how many to add at most; the end of a document stops it. Prompt and continuation together are
            no longer than the model's `seq_length`.
        temperature: divides the logits before sampling; 0 takes the likeliest token.
        generator: a CPU generator in the same state on every rank.

    Returns:
        The new ids alone.
    """
    was_training = model.training
    model.eval()
    ids = list(prompt_ids)
    for _ in range(new_tokens):
        logits = _next_logits(model, ids)[: tokenizer.vocab_size]
        if temperature:
            chosen = int(torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator))
        else:
            chosen = int(logits.argmax())
        if chosen == tokenizer.eod:
            break
        ids.append(chosen)
    model.train(was_training)
    return ids[len(prompt_ids) :]


def _next_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Float32 logits of the token after `ids`, [padded vocabulary], on the CPU."""
    device = next(model.parameters()).device
    length = -(-len(ids) // _PADDED_TO) * _PADDED_TO
    tokens = torch.zeros(1, length, dtype=torch.long, device=device)
    tokens[0, : len(ids)] = torch.tensor(ids, device=device)
    positions = torch.arange(length, device=device)[None]
    # Each rank has its part of the vocabulary. The model could gather it, but not before 0.13 with sequence parallelism.
    local = model(tokens, positions, None)[0, len(ids) - 1]
    return gather_from_tensor_model_parallel_region(local).float().cpu()
