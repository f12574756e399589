import itertools
from types import SimpleNamespace

import pytest
import torch

from mindspeed_nsa.pretrain.data import batches, build_datasets, check_dataset, summary_of
from mindspeed_nsa.pretrain.prepare import prepare
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer

pytest.importorskip("megatron.core")

BYTES = build_tokenizer("ByteTokenizer")
LENGTH = 16


@pytest.fixture
def prefix(tmp_path):
    """40 files of 50 different bytes each, 8 of them held out: 32 * 51 tokens to train on."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text("".join(chr(33 + (number + i) % 90) for i in range(50)))
    prepare([tmp_path / "corpus"], tmp_path / "data", BYTES, suffixes=[".txt"], held_out=0.2)
    return tmp_path / "data"


def job(prefix, **data):
    defaults = {
        "data_path": f"{prefix}_train",
        "valid_data_path": f"{prefix}_valid",
        "data_cache_path": None,
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
    }
    return SimpleNamespace(
        data=SimpleNamespace(**defaults | data),
        model=SimpleNamespace(seq_length=LENGTH),
        training=SimpleNamespace(seed=7),
    )


def take(dataset, count, **arguments):
    defaults = {"consumed_samples": 0, "micro_batch_size": 2, "data_parallel_rank": 0, "data_parallel_size": 1}
    return list(itertools.islice(batches(dataset, **defaults | arguments), count))


def assert_same(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_labels_are_the_next_tokens_and_all_of_them_count(prefix):
    train, valid = build_datasets(job(prefix), BYTES, 20, 4)
    assert len(train) >= 20 and len(valid) >= 4
    ends = 0
    for batch in take(train, 10):
        assert {key: (tuple(value.shape), value.dtype) for key, value in batch.items()} == {
            "tokens": ((2, LENGTH), torch.int64),
            "labels": ((2, LENGTH), torch.int64),
            "position_ids": ((2, LENGTH), torch.int64),
            "loss_mask": ((2, LENGTH), torch.float32),
        }
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])
        # A letter is followed by the next one in turn, and the last of a file by the end of the document.
        tokens, labels = batch["tokens"], batch["labels"]
        inside = (tokens != 256) & (labels != 256)
        assert torch.equal((tokens[inside] - 33 + 1) % 90, labels[inside] - 33)
        assert torch.equal(batch["loss_mask"], torch.ones(2, LENGTH))
        assert torch.equal(batch["position_ids"], torch.arange(LENGTH).expand(2, -1))
        ends += int((labels == 256).sum())
    assert ends > 0


def test_samples_restart_their_positions_if_asked(prefix):
    train, _ = build_datasets(job(prefix, reset_position_ids=True), BYTES, 20, 0)
    batch = next(item for item in take(train, 10) if (item["tokens"][0, :-1] == 256).any())
    end = int((batch["tokens"][0] == 256).nonzero()[0])
    assert batch["position_ids"][0, end : end + 2].tolist() == [end, 0]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_going_on_is_the_same_as_never_having_stopped(prefix, num_workers):
    train, _ = build_datasets(job(prefix), BYTES, 20, 0)
    assert_same(take(train, 7, consumed_samples=6, num_workers=num_workers), take(train, 10)[3:])


def test_data_parallel_ranks_share_the_samples_of_one(prefix):
    train, _ = build_datasets(job(prefix), BYTES, 24, 0)
    ranks = [take(train, 4, data_parallel_rank=rank, data_parallel_size=3) for rank in range(3)]
    assert_same([ranks[index % 3][index // 3] for index in range(12)], take(train, 12))


def test_reading_leaves_the_global_generator_alone(prefix):
    train, _ = build_datasets(job(prefix), BYTES, 20, 0)
    before = torch.random.get_rng_state()
    take(train, 3)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_end_is_loud_and_on_all_ranks_at_once(prefix):
    _, valid = build_datasets(job(prefix), BYTES, 1, 4)
    steps = len(valid) // 3
    assert len(valid) % 3, "the last step must be one that not all ranks can fill"
    for rank in range(3):
        iterator = batches(valid, 0, 1, rank, 3)
        assert len(list(itertools.islice(iterator, steps))) == steps
        with pytest.raises(ValueError, match=f"all {len(valid)} samples are used up: 3 more .* after {steps * 3}"):
            next(iterator)
    with pytest.raises(ValueError, match="used up"):
        next(batches(valid, 10**6, 2, 0, 1))


def test_training_goes_on_over_epochs_and_evaluation_does_not(prefix):
    many = 3 * 32 * 51 // LENGTH
    train, _ = build_datasets(job(prefix), BYTES, many, 0)
    assert len(train) >= many
    with pytest.raises(ValueError, match=r"valid_data_path: .*_valid holds 408 tokens, 400 sequences"):
        build_datasets(job(prefix), BYTES, 1, 400)


def test_new_data_under_an_old_name_is_not_read_by_the_old_index(prefix, tmp_path):
    build_datasets(job(prefix), BYTES, 20, 4)
    (tmp_path / "corpus" / "new.txt").write_text("z" * 400)
    prepare([tmp_path / "corpus"], prefix, BYTES, suffixes=[".txt"], held_out=0.2)
    train, _ = build_datasets(job(prefix), BYTES, 20, 4)
    read = sum(int((train[index]["tokens"] == ord("z")).sum()) for index in range(len(train)))
    assert read > 300


def test_whole_files_are_counted(prefix):
    assert check_dataset(f"{prefix}_train") == 32 * 51
    assert summary_of(f"{prefix}_valid").valid_tokens == 8 * 51
    assert summary_of("elsewhere_train") is None


@pytest.mark.parametrize("suffix", ["bin", "idx"])
@pytest.mark.parametrize("change", [-1, +2])
def test_files_of_another_size_are_refused(prefix, suffix, change):
    path = prefix.with_name(f"data_train.{suffix}")
    content = path.read_bytes()
    path.write_bytes((content + b"\0\0")[: len(content) + change])
    state = "truncated" if change < 0 else "damaged"
    with pytest.raises(
        ValueError, match=rf"data_train\.{suffix}: {state}: expected {len(content)} bytes, found {len(content) + change}"
    ):
        build_datasets(job(prefix), BYTES, 20, 0)
    assert not (prefix.parent / "cache").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"MMID", "truncated: expected at least 34 bytes, found 4"), (b"x" * 100, "not the index of a Megatron dataset")],
)
def test_a_wrong_index_is_refused(prefix, content, message):
    prefix.with_name("data_train.idx").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_dataset(f"{prefix}_train")


def test_missing_files_are_named(prefix):
    with pytest.raises(ValueError, match=r"nowhere\.idx: no such file"):
        build_datasets(job(prefix, data_path="nowhere"), BYTES, 20, 0)
    prefix.with_name("data_valid.bin").unlink()
    with pytest.raises(ValueError, match=r"data_valid\.bin: no such file"):
        build_datasets(job(prefix), BYTES, 20, 4)


def test_another_tokenizer_is_refused(prefix):
    other = SimpleNamespace(vocab_size=300, eod=299, pad=-1, unique_identifiers={"class": "Other"})
    with pytest.raises(ValueError, match=r"prepared with tokenizer .*ByteTokenizer.*, the job's is .*Other"):
        build_datasets(job(prefix), other, 20, 0)


def test_a_dataset_without_a_sequence_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("short")
    prepare([tmp_path / "short.txt"], tmp_path / "d", BYTES, suffixes=[], held_out=0)
    with pytest.raises(ValueError, match="holds 6 tokens, 1 sequences of seq_length 16 need 17"):
        build_datasets(job(tmp_path / "d"), BYTES, 1, 0)
