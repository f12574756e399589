import json

import pytest

from mindspeed_nsa.pretrain.tokenizer import NO_PAD, build_tokenizer

tokenizers = pytest.importorskip("tokenizers")

WORDS = {"one": 0, "two": 1, "three": 2, "<unk>": 3, "<|endoftext|>": 7, "<stop>": 9, "<pad>": 8}


@pytest.fixture
def tokenizer_json(tmp_path):
    model = tokenizers.models.WordLevel(WORDS, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<|endoftext|>", "<stop>", "<pad>"])
    tokenizer.enable_truncation(max_length=2)
    tokenizer.enable_padding(length=4, pad_id=8, pad_token="<pad>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_bytes_come_back_as_the_same_text():
    tokenizer = build_tokenizer("ByteTokenizer")
    text = "naïve 文\r\n\0end"
    ids = tokenizer.tokenize(text)
    assert ids == list(text.encode())
    assert tokenizer.detokenize([*ids, tokenizer.eod]) == text
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (257, 256, NO_PAD)


def test_half_a_character_becomes_the_replacement_character():
    assert build_tokenizer("ByteTokenizer").detokenize([97, 0xE6, 98]) == "a\ufffdb"


def test_hugging_face_ids_are_whole_documents(tokenizer_json):
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_json))
    assert tokenizer.tokenize("one two three") == [0, 1, 2]  # neither cut to 2 nor filled up to 4
    assert tokenizer.tokenize("two") == [1]
    assert tokenizer.detokenize([0, 2, tokenizer.eod]) == "one three"
    assert (tokenizer.eod, tokenizer.pad) == (7, NO_PAD)
    assert tokenizer.vocab_size == 10  # ids go to 9, though there are only 7 of them


def test_hugging_face_config_names_the_special_tokens(tokenizer_json):
    config = {"eos_token": {"content": "<stop>"}, "pad_token": "<pad>"}
    tokenizer_json.with_name("tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_json))
    assert (tokenizer.eod, tokenizer.pad) == (9, 8)


def test_the_end_of_document_is_never_padding(tokenizer_json):
    config = {"eos_token": "<stop>", "pad_token": "<stop>"}
    tokenizer_json.with_name("tokenizer_config.json").write_text(json.dumps(config))
    assert build_tokenizer("HuggingFaceTokenizer", str(tokenizer_json)).pad == NO_PAD


def test_identifiers_follow_the_content_not_the_path(tokenizer_json, tmp_path):
    (tmp_path / "copy").mkdir()
    copy = tmp_path / "copy" / "tokenizer.json"
    copy.write_bytes(tokenizer_json.read_bytes())
    first = build_tokenizer("HuggingFaceTokenizer", str(tokenizer_json)).unique_identifiers
    assert build_tokenizer("HuggingFaceTokenizer", str(copy)).unique_identifiers == first
    copy.write_text(copy.read_text().replace('"three"', '"four"'))
    assert build_tokenizer("HuggingFaceTokenizer", str(copy)).unique_identifiers != first


@pytest.mark.parametrize(
    ("tokenizer_type", "content", "message"),
    [
        ("SentencePiece", None, "'SentencePiece' is none of ByteTokenizer, HuggingFaceTokenizer"),
        ("ByteTokenizer", "{}", "ByteTokenizer takes none"),
        ("HuggingFaceTokenizer", None, "needs the path of a tokenizer.json"),
        ("HuggingFaceTokenizer", "{}", "not a tokenizer.json"),
    ],
)
def test_wrong_settings_are_named(tmp_path, tokenizer_type, content, message):
    path = tmp_path / "tokenizer.json"
    if content:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        build_tokenizer(tokenizer_type, str(path) if content else None)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json: no such file"):
        build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "none.json"))


def test_a_missing_end_of_document_is_named(tokenizer_json):
    tokenizer_json.with_name("tokenizer_config.json").write_text('{"eos_token": "<nowhere>"}')
    with pytest.raises(ValueError, match="has no end-of-document token <nowhere>"):
        build_tokenizer("HuggingFaceTokenizer", str(tokenizer_json))
