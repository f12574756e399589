"""Settings a person writes: the `nsa:` section, and the YAML reading that every job file shares."""

import difflib
import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class Section(BaseModel):
    """A mapping of a job file. Unknown keys, wrong types and impossible values are refused in one line.

    Raises:
        ValueError: names the key, what was given and what is allowed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(explain(error, type(self))) from None


class NSAConfig(Section):
    """Native Sparse Attention of one model (arXiv 2502.11089, section 3). Lengths and sizes are in tokens.

    Args:
        enabled: false trains the same model with dense attention.
        compress_block_size: tokens pooled into one compressed token, the paper's l.
        compress_stride: tokens between the starts of two pooled windows, the paper's d.
        select_block_size: tokens in a selectable block, the paper's l'.
        select_block_count: blocks each query attends to, forced ones included, the paper's n.
        window_size: tokens in the sliding window, the query's own included, the paper's w.
        init_blocks: blocks forced at the start of a sample.
        local_blocks: blocks forced at the query: its own and those right before.
        select_own_block: whether the selected branch may hold the query's own block; without it the window alone shows it.
            `auto`: yes, unless the chip can keep that branch causal only without it (plan B; contract, section 6). It does not
            concern queries before token `select_block_size * select_block_count` of a sample, which see all there is.
        compression: `linear` is the operator's learned pooling, `mean` its untrained form, `mlp` the paper's network.
        intra_block_position: add a learned position to each token of a pooled window.
        separate_kv: each branch has its own key and value projections, as in the paper.
        gate: the gates are computed from the layer's `hidden` states, or per head from the `query`.
        importance: `ascend` scores blocks as the chip's operator does, `paper` by equation 9 (geometric overlap).
        backend: which kernels run; see `mindspeed_nsa.ops.use_backend`.
        layers: `all`, a list of layer numbers from 0, or a slice of them such as `1::2`; the others stay dense.
        strict: refuse what the Ascend operators cannot run exactly, so that what trains on a CPU trains on the chip.
    """

    enabled: bool = True
    compress_block_size: int = Field(32, ge=1)
    compress_stride: int = Field(16, ge=1)
    select_block_size: int = Field(64, ge=1)
    select_block_count: int = Field(16, ge=1)
    window_size: int = Field(512, ge=1)
    init_blocks: int = Field(1, ge=0)
    local_blocks: int = Field(2, ge=1)
    select_own_block: Literal["auto"] | bool = "auto"
    compression: Literal["linear", "mean", "mlp"] = "linear"
    intra_block_position: bool = True
    separate_kv: bool = True
    gate: Literal["hidden", "query"] = "hidden"
    importance: Literal["ascend", "paper"] = "ascend"
    backend: Literal["auto", "reference", "cpu", "ascend"] = "auto"
    layers: str | list[int] = "all"
    strict: bool = True

    @classmethod
    def from_yaml(cls, path: str | Path) -> "NSAConfig":
        """Read the `nsa:` section of a job file.

        Args:
            path: a job file, or a file with only an `nsa:` section.

        Raises:
            ValueError: the file is missing, is not YAML, has no `nsa:` section, or the section is wrong.
        """
        content = read_yaml(path)
        if not isinstance(content.get("nsa"), dict):
            raise ValueError(f"{path}: has no `nsa:` section")
        try:
            return cls(**content["nsa"])
        except ValueError as error:
            raise ValueError(f"{path}: nsa.{error}") from None

    @model_validator(mode="after")
    def _check_sizes(self) -> "NSAConfig":
        if self.compress_block_size % self.compress_stride:
            raise ValueError(
                f"compress_block_size: {self.compress_block_size} is not a multiple of compress_stride {self.compress_stride}"
            )
        if self.select_block_size % self.compress_stride:
            raise ValueError(
                f"select_block_size: {self.select_block_size} is not a multiple of compress_stride {self.compress_stride}"
            )
        if self.select_block_size < self.compress_block_size:
            raise ValueError(
                f"select_block_size: {self.select_block_size} is less than compress_block_size {self.compress_block_size}"
            )
        if self.init_blocks + self.local_blocks > self.select_block_count:
            raise ValueError(
                f"select_block_count: {self.select_block_count} leaves no room for the forced blocks, "
                f"init_blocks {self.init_blocks} + local_blocks {self.local_blocks}"
            )
        return self

    @model_validator(mode="after")
    def _check_strict(self) -> "NSAConfig":
        if not self.strict:
            return self
        for key, chip in _CHIP_SIZES.items():
            if getattr(self, key) != chip:
                raise ValueError(
                    f"{key}: {getattr(self, key)} cannot run on the Ascend operators, which take {chip}; "
                    "`strict: false` allows it on other backends"
                )
        if self.importance != "ascend":
            raise ValueError(
                f"importance: {self.importance} is not what the Ascend operator computes; "
                "`strict: false` allows it on other backends"
            )
        return self

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, layers: str | list[int]) -> str | list[int]:
        if isinstance(layers, list):
            if any(number < 0 for number in layers) or len(set(layers)) < len(layers):
                raise ValueError(f"{layers} must be different numbers from 0")
        elif layers != "all" and (not re.fullmatch(r"(-?\d+)?:(-?\d+)?(:[1-9]\d*)?", layers)):
            raise ValueError(f"{layers!r} is none of `all`, a list of numbers, a slice such as `1::2`")
        return layers

    def nsa_layers(self, num_layers: int) -> list[int]:
        """The layers of `num_layers`, counted from 0, whose attention is NSA.

        Raises:
            ValueError: `layers` names none, or one that the model does not have.
        """
        if self.layers == "all":
            return list(range(num_layers))
        if isinstance(self.layers, list):
            chosen = sorted(self.layers)
        else:
            bounds = (int(part) if part else None for part in self.layers.split(":"))
            chosen = list(range(num_layers)[slice(*bounds)])
        if not chosen or chosen[-1] >= num_layers:
            raise ValueError(f"layers: {self.layers} names none, or too many, of the layers 0 to {num_layers - 1}")
        return chosen


# What the NSA operators document as supported (contract sections 2 and 3).
_CHIP_SIZES = {"compress_block_size": 32, "compress_stride": 16, "select_block_size": 64, "select_block_count": 16}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a mapping of sections with a safe loader: nothing the file says is executed.

    Raises:
        ValueError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected sections such as `model:` and `nsa:`, found {type(content).__name__}")
    for section, values in content.items():
        for key in values if isinstance(values, dict) else []:
            if not isinstance(key, str):
                raise ValueError(f"{path}: {section}.{key}: unknown key; keys are text")
    return content


def parse_yaml(text: str) -> Any:
    """Parse YAML text; unlike YAML 1.1, `1e-3` is a number and `2:4` is not."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
    list("-+.0123456789"),
)


def explain(error: ValidationError, section: type[BaseModel]) -> str:
    """The first fault of a validation as `section.key: what is wrong`."""
    # A misspelt key that is required is missing too: the spelling tells more.
    fault = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in fault["loc"] if not str(part).startswith(("list[", "str", "function")))
    if fault["type"] == "extra_forbidden":
        names = list(_section_at(section, fault["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(fault["loc"][-1]), names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(sorted(names))}"
        return f"{key}: unknown key; {hint}"
    if fault["type"] == "value_error":
        message = str(fault["ctx"]["error"])
        # A validator of one field does not repeat its name; one of a whole section says which key it means.
        is_section = not key or isinstance(fault["input"], dict)
        return f"{key}.{message}".lstrip(".") if is_section else f"{key}: {message}"
    return f"{key}: {fault['msg'][0].lower()}{fault['msg'][1:]}, given {fault['input']!r}"


def _section_at(section: type[BaseModel], keys: tuple[Any, ...]) -> type[BaseModel]:
    for key in keys:
        annotation = section.model_fields[key].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        section = annotation
    return section
