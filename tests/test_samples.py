import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from mindspeed_nsa.samples import Samples

CPU = torch.device("cpu")


def test_by_hand():
    samples = Samples.of([3, 3, 10], 10)
    assert samples.ends == (3, 3, 10)
    assert samples.spans == [(0, 3), (3, 3), (3, 10)]
    assert samples.windows(4, 2) == [0, 0, 2]
    assert samples.blocks(4) == [1, 1, 3]
    assert samples.window_tokens(4, 2, CPU).tolist() == [[3, 4, 5, 6], [5, 6, 7, 8]]
    assert samples.whole.positions(CPU).tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 6]


def test_none_is_one_sample():
    assert Samples.of(None, 7) == Samples((7,))


def test_tensors_are_taken():
    assert Samples.of(torch.tensor([3, 7]), 7).ends == (3, 7)


@pytest.mark.parametrize("ends", [[], [3], [3, 8], [5, 3, 7], [-1, 7], [7, 7.5], [2.5, 7], [0, 3, 7, 3]])
def test_what_are_no_prefix_sums(ends):
    with pytest.raises(ValueError, match=r"actual_seq_len .* must be prefix sums that rise to the 7 tokens"):
        Samples.of(ends, 7)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(1, 64), st.integers(1, 64))
def test_windows_lie_in_their_samples(lengths, block_size, stride):
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    samples = Samples.of(ends, ends[-1])
    assert sum(stop - start for start, stop in samples.spans) == len(samples.whole.positions(CPU)) == ends[-1]
    starts = [t for start, stop in samples.spans for t in range(start, stop, stride) if t + block_size <= stop]
    assert samples.window_tokens(block_size, stride, CPU)[:, 0].tolist() == starts
    assert samples.windows(block_size, stride)[-1] == len(starts)
    assert samples.blocks(block_size)[-1] == sum(len(range(0, length, block_size)) for length in lengths)


def test_nothing_fake_is_kept():
    """Shapes are tried on fake tensors before the run; what that leaves behind must not reach the run."""
    samples = Samples((5, 1234))
    with FakeTensorMode():
        samples.whole.positions(CPU), samples.window_tokens(4, 2, CPU)
    assert not isinstance(samples.whole.positions(CPU), FakeTensor)
    assert not isinstance(samples.window_tokens(4, 2, CPU), FakeTensor)
    with torch.inference_mode():
        samples.whole.positions(CPU), samples.window_tokens(8, 2, CPU)
    assert not samples.whole.positions(CPU).is_inference()
    assert not samples.window_tokens(8, 2, CPU).is_inference()
