import math

import pytest
import torch

from mindspeed_nsa.pretrain.evaluate import unigram_loss
from mindspeed_nsa.pretrain.prepare import Summary


def test_the_unigram_loss_is_the_one_worked_out_by_hand():
    summary = Summary(
        tokenizer={"class": "three ids"},
        train_documents=1,
        train_tokens=5,
        valid_documents=1,
        valid_tokens=8,
        train_counts=[4, 1, 0],
        held_out_files=["a"],
        not_text=[],
    )
    dataset = [
        {"labels": torch.tensor([0, 0, 1]), "loss_mask": torch.tensor([1.0, 1.0, 1.0])},
        {"labels": torch.tensor([2, 1, 1]), "loss_mask": torch.tensor([1.0, 0.0, 0.0])},
        {"labels": torch.tensor([2, 2, 2]), "loss_mask": torch.tensor([1.0, 1.0, 1.0])},
    ]
    # One is added to each count: the probabilities are 5/8, 2/8 and 1/8. The third sample is not asked for.
    expected = -(2 * math.log(5 / 8) + math.log(2 / 8) + math.log(1 / 8)) / 4
    assert unigram_loss(summary, dataset, samples=2) == pytest.approx(expected, rel=1e-12)
