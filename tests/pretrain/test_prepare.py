import numpy as np
import pytest

from mindspeed_nsa.pretrain.prepare import Summary, prepare, python_sources
from mindspeed_nsa.pretrain.tokenizer import build_tokenizer

BYTES = build_tokenizer("ByteTokenizer")


def documents(prefix):
    pytest.importorskip("megatron.core")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return [document.tolist() for document in IndexedDataset(str(prefix))]


def write(folder, **texts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_bytes(text)
    return folder


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus", **{f"file{i}": f"text {i}\r\n".encode() * (i + 1) for i in range(20)})


def run(inputs, prefix, held_out=0.2, suffixes=(".txt",)):
    return prepare(inputs, prefix, BYTES, suffixes=list(suffixes), held_out=held_out)


def test_a_document_is_a_file_and_its_end(corpus, tmp_path):
    summary = run([corpus], tmp_path / "out" / "text")
    train, valid = documents(tmp_path / "out/text_train"), documents(tmp_path / "out/text_valid")
    assert (len(train), len(valid)) == (16, 4)
    held_out = [[*list((corpus.parent / name).read_bytes()), 256] for name in summary.held_out_files]
    everything = sorted([*list(path.read_bytes()), 256] for path in corpus.iterdir())
    assert valid == held_out
    assert sorted(train + valid) == everything


def test_the_summary_counts_what_was_written(corpus, tmp_path):
    summary = run([corpus], tmp_path / "text")
    train = np.concatenate(documents(tmp_path / "text_train"))
    assert summary.train_counts == np.bincount(train, minlength=257).tolist()
    assert summary.train_tokens == len(train)
    assert summary.valid_tokens == sum(map(len, documents(tmp_path / "text_valid")))
    assert Summary.load(tmp_path / "text.json") == summary


def test_the_choice_depends_on_names_alone(corpus, tmp_path):
    elsewhere = write(tmp_path / "b" / "corpus", **{path.stem: b"other" for path in corpus.iterdir()})
    first = run([corpus], tmp_path / "first")
    assert run([elsewhere], tmp_path / "second").held_out_files == first.held_out_files


def test_few_files_still_hold_one_out(tmp_path):
    corpus = write(tmp_path / "c", a=b"1", b=b"2")
    assert run([corpus], tmp_path / "t", held_out=0.01).valid_documents == 1


def test_nothing_held_out_leaves_no_old_held_out_data(corpus, tmp_path):
    run([corpus], tmp_path / "t")
    assert run([corpus], tmp_path / "t", held_out=0).valid_documents == 0
    assert not list(tmp_path.glob("t_valid*"))


def test_empty_files_and_files_that_are_not_text_are_left_out(tmp_path):
    corpus = write(tmp_path / "c", a=b"1", b=b"2", empty=b"", binary=b"\xff\xfe\x00")
    summary = run([corpus], tmp_path / "t", held_out=0.5)
    assert (summary.train_documents, summary.valid_documents) == (1, 1)
    assert summary.not_text == ["c/binary.txt"]


def test_suffixes_choose_in_folders_only(tmp_path):
    corpus = write(tmp_path / "c", a=b"1", b=b"2")
    (corpus / "code.py").write_text("3")
    summary = run([corpus, corpus / "code.py"], tmp_path / "t", held_out=0)
    assert summary.train_documents == 3


def test_a_failure_leaves_what_was_there(corpus, tmp_path, monkeypatch):
    run([corpus], tmp_path / "t")
    before = {path: path.read_bytes() for path in tmp_path.glob("t*") if path.is_file()}
    monkeypatch.setattr(type(BYTES), "tokenize", lambda self, text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run([corpus], tmp_path / "t")
    assert {path: path.read_bytes() for path in tmp_path.glob("t*")} == before


@pytest.mark.parametrize(
    ("held_out", "suffixes", "message"),
    [(1.0, [".txt"], "not in"), (0.99, [".txt"], "none to train on"), (0.2, [".rst"], "ends with .rst")],
)
def test_wrong_settings_write_nothing(corpus, tmp_path, held_out, suffixes, message):
    with pytest.raises(ValueError, match=message):
        run([corpus], tmp_path / "out" / "t", held_out=held_out, suffixes=suffixes)
    assert not (tmp_path / "out").exists()


def test_a_missing_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        run([tmp_path / "nowhere"], tmp_path / "t")


def test_a_file_reached_twice_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"file0\.txt is reached twice"):
        run([corpus, corpus / "file0.txt"], tmp_path / "t")


def test_a_damaged_summary_is_named(tmp_path):
    (tmp_path / "t.json").write_text('{"tokenizer": {}}')
    with pytest.raises(ValueError, match=r"t\.json: train_documents"):
        Summary.load(tmp_path / "t.json")


def test_python_has_sources():
    names = {path.name for path in python_sources()}
    assert {"abc.py", "json"} <= names
    assert not {"site-packages", "dist-packages", "test"} & names


def test_a_link_in_the_standard_library_is_not_a_second_text(tmp_path, monkeypatch):
    (tmp_path / "abc.py").write_text("a = 1\n")
    (tmp_path / "abd.py").symlink_to("abc.py")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert python_sources() == [tmp_path / "abc.py"]
