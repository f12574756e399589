import pytest
import torch
from torch import nn

from mindspeed_nsa.pretrain.tokenizer import build_tokenizer

pytest.importorskip("megatron.core")

from megatron.core import parallel_state

from mindspeed_nsa.patches import cpu_host
from mindspeed_nsa.pretrain.sample import generate

BYTES = build_tokenizer("ByteTokenizer")
PADDED_VOCABULARY = 384


class Successor(nn.Module):
    """Gives this rank's part of logits that favour the id after the last one, but for one that no token has."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.lengths = []

    def forward(self, tokens, positions, mask):
        assert not self.training and mask is None
        assert torch.equal(positions, torch.arange(tokens.shape[1])[None])
        self.lengths.append(tokens.shape[1])
        logits = torch.zeros(*tokens.shape, PADDED_VOCABULARY)
        logits[..., 300] = 9
        logits.scatter_(2, (tokens + 1)[..., None], 5.0)
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        return logits.chunk(ranks, dim=2)[parallel_state.get_tensor_model_parallel_rank()]


def start(rank, world_size, store):
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=world_size)


def stop():
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    start(0, 1, torch.distributed.HashStore())
    yield
    stop()


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


def on_one_of_two_ranks(rank, folder):
    cpu_host.install()
    start(rank, 2, torch.distributed.FileStore(f"{folder}/store", 2))
    ids = run(Successor(), [189], 5) + run(Successor(), [10], 20, temperature=1.0)
    torch.save(ids, f"{folder}/{rank}")
    stop()


def test_two_ranks_say_what_one_says(tmp_path):
    torch.multiprocessing.spawn(on_one_of_two_ranks, (tmp_path,), nprocs=2)
    expected = [190, 191, 192, 193, 194, *run(Successor(), [10], 20, temperature=1.0)]
    assert [torch.load(tmp_path / str(rank)) for rank in range(2)] == [expected, expected]
