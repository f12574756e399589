import torch
from torch import nn

from mindspeed_nsa.pretrain.sample import generate
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer

BYTES = build_tokenizer("ByteTokenizer")
PADDED_VOCABULARY = 384


class Successor(nn.Module):
    """Gives the id after the last one the largest logit but for ids that no token has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.lengths = []

    def forward(self, tokens, positions, mask, runtime_gather_output):
        assert runtime_gather_output and not self.training and mask is None
        assert torch.equal(positions, torch.arange(tokens.shape[1])[None])
        self.lengths.append(tokens.shape[1])
        logits = torch.zeros(*tokens.shape, PADDED_VOCABULARY)
        logits[..., 300] = 9
        return logits.scatter(2, (tokens + 1)[..., None], 5.0)


def run(model, prompt, new_tokens, temperature=0.0, seed=0):
    return generate(model, BYTES, prompt, new_tokens, temperature, torch.Generator().manual_seed(seed))


def test_the_likeliest_token_follows_each_time():
    model = Successor()
    assert run(model, [7, 40], 3) == [41, 42, 43]
    assert model.training


def test_inputs_are_padded_and_read_at_their_last_token():
    model = Successor()
    assert run(model, list(range(63)), 3) == [63, 64, 65]
    assert model.lengths == [64, 64, 128]


def test_the_end_of_a_document_stops_it():
    assert run(Successor(), [253], 10) == [254, 255]


def test_sampling_follows_the_temperature_and_the_generator():
    first = run(Successor(), [10], 20, temperature=1.0)
    assert first == run(Successor(), [10], 20, temperature=1.0)
    assert first != run(Successor(), [10], 20, temperature=1.0, seed=1)
    assert max(first) < BYTES.vocab_size
    assert run(Successor(), [10], 5, temperature=0.01) == [11, 12, 13, 14, 15]
