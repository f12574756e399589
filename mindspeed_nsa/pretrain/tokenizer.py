"""Text to token ids and back, with the few names that Megatron's datasets ask of a tokenizer."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Protocol

# A tokenizer without a padding token reports an id that no text has, as Megatron's datasets do themselves.
NO_PAD = -1

# The vocabulary is padded to a multiple of this, whatever the layout, so that checkpoints fit every layout.
_VOCABULARY_MULTIPLE = 128

# End-of-document tokens of published tokenizers, for a tokenizer.json that comes without a tokenizer_config.json.
_KNOWN_EOD = ("<|endoftext|>", "<|end_of_text|>", "<|endofprompt|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """What preparing, training and sampling need of a tokenizer.

    Attributes:
        vocab_size: token ids are in [0, vocab_size).
        eod: the id that ends a document.
        pad: the id whose labels carry no loss, -1 where there is none. Never `eod`: its loss would be lost.
        unique_identifiers: the same for two tokenizers if and only if they give the same ids.
    """

    vocab_size: int
    eod: int
    pad: int
    unique_identifiers: dict[str, str]

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without any token added at its ends."""

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids, without special tokens; what is not valid text becomes the replacement character."""


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, and 256 for the end of a document."""

    vocab_size = 257
    eod = 256
    pad = NO_PAD
    unique_identifiers = {"class": "ByteTokenizer"}  # noqa: RUF012  the protocol's attribute is an instance's

    def tokenize(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        return list(text.encode("utf-8"))

    def detokenize(self, ids: list[int]) -> str:
        """The text of the bytes among ids."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`, with the end-of-document token of the `tokenizer_config.json` beside it, if any.

    Args:
        tokenizer_model: path of the `tokenizer.json`.

    Raises:
        ValueError: the file is missing or no tokenizer, or has no end-of-document token.
    """

    def __init__(self, tokenizer_model: str) -> None:
        try:
            content = Path(tokenizer_model).read_bytes()
        except OSError as error:
            raise ValueError(f"{tokenizer_model}: {(error.strerror or str(error)).lower()}") from None
        self._tokenizer = _load(tokenizer_model, content)
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1
        special = _special_tokens(Path(tokenizer_model).with_name("tokenizer_config.json"))
        self.eod = self._eod(tokenizer_model, special.get("eos_token"))
        pad = self._tokenizer.token_to_id(special.get("pad_token") or "")
        self.pad = NO_PAD if pad is None or pad == self.eod else pad
        self.unique_identifiers = {
            "class": "HuggingFaceTokenizer",
            "sha256": hashlib.sha256(content).hexdigest(),
            "eod": str(self.eod),
        }

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, without special tokens at its ends."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def detokenize(self, ids: list[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _eod(self, path: str, configured: str | None) -> int:
        for token in [configured] if configured else _KNOWN_EOD:
            if (token_id := self._tokenizer.token_to_id(token)) is not None:
                return token_id
        wanted = configured or f"any of {', '.join(_KNOWN_EOD)}"
        raise ValueError(
            f"{path}: has no end-of-document token {wanted}; a tokenizer_config.json beside it may name an eos_token"
        )


def build_tokenizer(tokenizer_type: str, tokenizer_model: str | None = None) -> Tokenizer:
    """Make a tokenizer by its name in Megatron's arguments.

    Args:
        tokenizer_type: `ByteTokenizer` or `HuggingFaceTokenizer`.
        tokenizer_model: path of a `tokenizer.json`, for `HuggingFaceTokenizer` only.

    Raises:
        ValueError: the type is unknown, or the model file is missing, wrong or not called for.
    """
    if tokenizer_type == "ByteTokenizer":
        if tokenizer_model is not None:
            raise ValueError(f"tokenizer_model: ByteTokenizer takes none, given {tokenizer_model!r}")
        return ByteTokenizer()
    if tokenizer_type == "HuggingFaceTokenizer":
        if tokenizer_model is None:
            raise ValueError("tokenizer_model: HuggingFaceTokenizer needs the path of a tokenizer.json")
        return HuggingFaceTokenizer(tokenizer_model)
    raise ValueError(f"tokenizer_type: {tokenizer_type!r} is none of ByteTokenizer, HuggingFaceTokenizer")


def _load(path: str, content: bytes) -> Any:
    from tokenizers import Tokenizer as Implementation

    try:
        tokenizer = Implementation.from_buffer(content)
    except ValueError as error:
        raise ValueError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())}") from None
    # Settings for a model's input, saved with some tokenizers; they would cut documents short.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        tokens = {key: config.get(key) for key in ("eos_token", "pad_token")}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a tokenizer_config.json: {error}") from None
    # Older configs wrap a token in a mapping of its own.
    return {key: token["content"] if isinstance(token, dict) else token for key, token in tokens.items() if token}


def padded_vocabulary(vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding: a multiple of 128 that tensor parallelism can split."""
    multiple = math.lcm(_VOCABULARY_MULTIPLE, tensor_parallel_size)
    return -(-vocab_size // multiple) * multiple
