"""What a model must beat: the loss of guessing each token by how often it occurs in the training text."""

import numpy as np
from torch.utils.data import Dataset

from mindspeed_nsa.pretrain.prepare import Summary


def unigram_loss(summary: Summary, dataset: Dataset, samples: int) -> float:
    """The mean loss, over the same labels as a model's evaluation, of the training text's add-one unigram.

    Args:
        summary: of the training data; see `mindspeed_nsa.pretrain.data.summary_of`.
        dataset: the held-out dataset that `build_datasets` gave.
        samples: how many of its samples an evaluation takes, from the first on.

    Returns:
        Nats per token.
    """
    counts = np.asarray(summary.train_counts, dtype=np.float64) + 1
    losses = np.log(counts.sum()) - np.log(counts)
    total = weight = 0.0
    for index in range(samples):
        sample = dataset[index]
        mask = sample["loss_mask"].numpy()
        total += float((losses[sample["labels"].numpy()] * mask).sum())
        weight += float(mask.sum())
    return total / weight
