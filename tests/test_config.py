import pytest
import yaml

from mindspeed_nsa import NSAConfig
from mindspeed_nsa.config import Section, parse_yaml, read_yaml


def refusal(**values):
    with pytest.raises(ValueError) as error:
        NSAConfig(**values)
    message = str(error.value)
    assert "\n" not in message
    assert "pydantic" not in message
    return message


def test_defaults_are_the_chip_s():
    config = NSAConfig()
    assert config.model_dump() == {
        "enabled": True,
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "select_block_count": 16,
        "window_size": 512,
        "init_blocks": 1,
        "local_blocks": 2,
        "select_own_block": "auto",
        "compression": "linear",
        "intra_block_position": True,
        "separate_kv": True,
        "gate": "hidden",
        "importance": "ascend",
        "backend": "auto",
        "layers": "all",
        "strict": True,
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"windw_size": 4}, "windw_size: unknown key; did you mean window_size?"),
        ({"zzz": 4}, "zzz: unknown key; allowed: backend, compress_block_size"),
        ({"window_size": "512"}, "window_size: input should be a valid integer, given '512'"),
        ({"window_size": 512.0}, "window_size: input should be a valid integer, given 512.0"),
        ({"window_size": True}, "window_size: input should be a valid integer, given True"),
        ({"window_size": None}, "window_size: input should be a valid integer, given None"),
        ({"window_size": 0}, "window_size: input should be greater than or equal to 1, given 0"),
        ({"init_blocks": -1}, "init_blocks: input should be greater than or equal to 0, given -1"),
        ({"local_blocks": 0}, "local_blocks: input should be greater than or equal to 1, given 0"),
        ({"enabled": "yes"}, "enabled: input should be a valid boolean, given 'yes'"),
        ({"enabled": 1}, "enabled: input should be a valid boolean, given 1"),
        ({"compression": "conv"}, "compression: input should be 'linear', 'mean' or 'mlp', given 'conv'"),
        ({"gate": "none"}, "gate: input should be 'hidden' or 'query', given 'none'"),
        ({"importance": "sum"}, "importance: input should be 'ascend' or 'paper', given 'sum'"),
        ({"backend": "cuda"}, "backend: input should be 'auto', 'reference', 'cpu' or 'ascend', given 'cuda'"),
        ({"layers": {"a": 1}}, "layers: input should be a valid string"),
        ({"compress_stride": 24}, "compress_block_size: 32 is not a multiple of compress_stride 24"),
        ({"select_block_size": 72}, "select_block_size: 72 is not a multiple of compress_stride 16"),
        ({"select_block_size": 16}, "select_block_size: 16 is less than compress_block_size 32"),
        ({"local_blocks": 16}, "select_block_count: 16 leaves no room for the forced blocks, init_blocks 1 + local_blocks 16"),
    ],
)
def test_refused(values, words):
    assert words in refusal(**values)
    assert words in refusal(**values, strict=False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"compress_block_size": 64}, "compress_block_size: 64 cannot run on the Ascend operators, which take 32"),
        ({"compress_stride": 32}, "compress_stride: 32 cannot run on the Ascend operators, which take 16"),
        ({"select_block_size": 128}, "select_block_size: 128 cannot run on the Ascend operators, which take 64"),
        ({"select_block_count": 32}, "select_block_count: 32 cannot run on the Ascend operators, which take 16"),
        ({"importance": "paper"}, "importance: paper is not what the Ascend operator computes"),
    ],
)
def test_strict_refuses_what_the_chip_cannot_run(values, words):
    message = refusal(**values)
    assert words in message
    assert message.endswith("`strict: false` allows it on other backends")
    key, value = next(iter(values.items()))
    assert getattr(NSAConfig(**values, strict=False), key) == value


def test_frozen():
    with pytest.raises(ValueError, match="frozen"):
        NSAConfig().window_size = 4


# ---- layers


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ([4, 1], [1, 4]),
        ("1::2", [1, 3, 5]),
        ("::3", [0, 3]),
        (":2", [0, 1]),
        ("-2:", [4, 5]),
        ("::10", [0]),
        (":", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_layers(layers, numbers):
    assert NSAConfig(layers=layers).nsa_layers(6) == numbers


@pytest.mark.parametrize("layers", ["", "some", "1", "1::2::3", "::0", "::-1", "::-0", "-:", ":-", "1:2:", "1.5:", "1:2 3:4"])
def test_text_that_is_no_slice(layers):
    assert f"layers: {layers!r} is none of `all`, a list of numbers, a slice such as `1::2`" in refusal(layers=layers)


@pytest.mark.parametrize("layers", [[-1], [1, 1]])
def test_numbers_that_are_no_layers(layers):
    assert f"layers: {layers} must be different numbers from 0" in refusal(layers=layers)


@pytest.mark.parametrize("layers", [[], [0, 6], [7], "6:", "3:3"])
def test_layers_that_the_model_does_not_have(layers):
    config = NSAConfig(layers=layers)
    with pytest.raises(ValueError) as error:
        config.nsa_layers(6)
    assert str(error.value) == f"layers: {layers} names none, or too many, of the layers 0 to 5"


@pytest.mark.parametrize("layers", [[1.5], ["1"], [True], [[1]]])
def test_lists_of_what_is_no_number(layers):
    assert refusal(layers=layers).startswith("layers")


# ---- files


def write(tmp_path, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_from_yaml(tmp_path):
    path = write(tmp_path, "model: {num_layers: 2}\nnsa:\n  window_size: 256\n  layers: 1::2\n  gate: query\n")
    assert NSAConfig.from_yaml(path) == NSAConfig(window_size=256, layers="1::2", gate="query")
    assert NSAConfig.from_yaml(str(path)).window_size == 256
    assert NSAConfig.from_yaml(write(tmp_path, "nsa: {}")) == NSAConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {}\n", "has no `nsa:` section"),
        ("nsa: 3\n", "has no `nsa:` section"),
        ("- nsa\n", "expected sections such as `model:` and `nsa:`, found list"),
        ("", "expected sections such as `model:` and `nsa:`, found NoneType"),
        ("nsa: {window_size: [}\n", "not YAML: "),
        ("nsa: {window_size: 0}\n", "nsa.window_size: input should be greater than or equal to 1, given 0"),
        ("nsa: {windowsize: 9}\n", "nsa.windowsize: unknown key; did you mean window_size?"),
        ("nsa: {importance: paper}\n", "nsa.importance: paper is not what the Ascend operator computes"),
        ("nsa: {1: 2}\n", "nsa.1: unknown key"),
        ("nsa: {on: true}\n", "nsa.True: unknown key"),
        ("nsa: {window_size: 1e2}\n", "nsa.window_size: input should be a valid integer, given 100.0"),
    ],
)
def test_from_yaml_refuses(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as error:
        NSAConfig.from_yaml(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert words in message
    assert "\n" not in message


def test_a_slice_without_quotes_is_a_slice(tmp_path):
    """YAML 1.1 reads 2:4 as the number 124, minutes and seconds."""
    assert NSAConfig.from_yaml(write(tmp_path, "nsa: {layers: 2:4}\n")).nsa_layers(6) == [2, 3]


def test_files_that_cannot_be_read(tmp_path):
    for path, words in ((tmp_path / "none.yaml", "no such file"), (tmp_path, "is a directory")):
        with pytest.raises(ValueError) as error:
            NSAConfig.from_yaml(path)
        assert str(error.value) == f"{path}: {words}" or words in str(error.value)
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"nsa: \xff\xfe")
    with pytest.raises(ValueError, match="not YAML") as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_nothing_a_file_says_is_executed(tmp_path):
    touched = tmp_path / "touched"
    for tag in ("!!python/object/apply:os.system", "!!python/object/new:os.system", "!!python/name:os.system"):
        path = write(tmp_path, f"nsa: {tag} ['touch {touched}']\n")
        with pytest.raises(ValueError, match=r"not YAML: .*could not determine a constructor"):
            NSAConfig.from_yaml(path)
        assert not touched.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3E5", 3e5),
        ("-2e+4", -2e4),
        ("1.e-3", 1e-3),
        ("1.5e3", 1500.0),
        ("1.5e-3", 1.5e-3),
        ("7", 7),
        ("0.5", 0.5),
        ("true", True),
        ("e3", "e3"),
        ("1e", "1e"),
        ("1e-3x", "1e-3x"),
        ("'1e-3'", "1e-3"),
        ("[1e-3, 2]", [1e-3, 2]),
    ],
)
def test_numbers(text, value):
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_other_yaml_readers_are_left_as_they_are():
    assert yaml.safe_load("1e-3") == "1e-3"


def test_a_fault_in_an_inner_section_is_named_in_full():
    class Outer(Section):
        nsa: NSAConfig

    for values, words in (
        ({"windowsize": 1}, "nsa.windowsize: unknown key; did you mean window_size?"),
        ({"window_size": 0}, "nsa.window_size: input should be greater"),
        ({"importance": "paper"}, "nsa.importance: paper is not"),
    ):
        with pytest.raises(ValueError, match=words.replace("?", r"\?")):
            Outer(nsa=values)
    with pytest.raises(ValueError, match="nsaa: unknown key; did you mean nsa"):
        Outer(nsaa={})
