"""Hugging Face models of the Llama family as weights of Megatron-core's GPT.

Both turn a query's and a key's first half against its second (Hugging Face's `rotate_half`, Megatron's RoPE that is not
interleaved), so rows of the projections keep their order within a head.
"""

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindspeed_nsa.pretrain.job import Job

_MODEL_TYPES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
# Old files keep this table, which every model computes.
_COMPUTED = "rotary_emb.inv_freq"


class HuggingFaceModel:
    """A folder with a `config.json` and `model*.safetensors`.

    Args:
        folder: the folder, as `save_pretrained` writes it.

    Raises:
        ValueError: it is no such folder, or of a model that is not of the Llama family.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = self._read_config()
        self._tensors = self._open_tensors()

    def check(self, job: Job, vocab_size: int) -> None:
        """Check that a job's model, whatever its attention, is this one.

        Args:
            job: the job.
            vocab_size: of its tokenizer.

        Raises:
            ValueError: it is not; one line that names the keys on both sides.
        """
        model = job.model
        found = [
            (f"{ours} {theirs!r}", f"model.{key}", value)
            for key, (value, ours, theirs) in self._wanted(job).items()
            if not _same(value, theirs)
        ]
        if model.v_head_dim not in (None, model.head_width):
            found.append((f"values as wide as keys, {model.head_width}", "model.v_head_dim", model.v_head_dim))
        if found:
            differences = "; ".join(f"it has {theirs}, the job {key}: {value!r}" for theirs, key, value in found[:3])
            raise ValueError(f"{self.folder} is of another model: {differences}")
        if vocab_size > self.config["vocab_size"]:
            raise ValueError(
                f"{self.folder}: config.json has vocab_size {self.config['vocab_size']}, "
                f"the job's {job.data.tokenizer_type} {vocab_size} tokens"
            )

    def load_into(self, model: torch.nn.Module, new: Collection[str]) -> list[str]:
        """Copy the weights into a model that `check` has passed.

        Args:
            model: Megatron's GPTModel, whole.
            new: names of its parameters that stay as they are.

        Returns:
            What was dropped and what was padded, a line each.

        Raises:
            ValueError: weights are missing, have another shape, or have no place in the model.
        """
        wanted = {name: parameter for name, parameter in model.named_parameters() if name not in new}
        sources = {name: _sources(name) for name in wanted}
        needed = {part for parts in sources.values() for part in parts}
        dropped = {name for name in self._tensors if name.endswith(_COMPUTED)}
        if self._is_tied():
            dropped |= {"lm_head.weight"} & self._tensors.keys()
        faults = [f"it lacks {name}" for name in sorted(needed - self._tensors.keys())]
        faults += [f"it has {name}" for name in sorted(self._tensors.keys() - needed - dropped)]
        if faults:
            raise ValueError(f"{self.folder} is of another model: {'; '.join(faults[:3])}")
        with torch.no_grad():
            for name, parameter in wanted.items():
                self._copy(sources[name], parameter)
        notes = [f"dropped: {', '.join(sorted(dropped))}"] if dropped else []
        return notes + self._vocabulary_note(wanted["embedding.word_embeddings.weight"].shape[0])

    def _wanted(self, job: Job) -> dict[str, tuple[Any, str, Any]]:
        """What must agree: the job's key in `model` to its value, and the name and value of the same thing here."""
        model, get = job.model, self.config.get
        heads = get("num_attention_heads")
        rope = {**(get("rope_scaling") or {}), **(get("rope_parameters") or {})}
        first = "model.layers.0.self_attn."
        return {
            "num_layers": (model.num_layers, "num_hidden_layers", get("num_hidden_layers")),
            "hidden_size": (model.hidden_size, "hidden_size", get("hidden_size")),
            "ffn_hidden_size": (model.ffn_width, "intermediate_size", get("intermediate_size")),
            "num_attention_heads": (model.num_attention_heads, "num_attention_heads", heads),
            "num_query_groups": (model.query_groups, "num_key_value_heads", get("num_key_value_heads") or heads),
            "kv_channels": (model.head_width, "head_dim", get("head_dim") or get("hidden_size", 0) // (heads or 1)),
            "norm_epsilon": (model.norm_epsilon, "rms_norm_eps", get("rms_norm_eps", 1e-6)),
            "rotary_base": (model.rotary_base, "rope_theta", rope.get("rope_theta") or get("rope_theta", 10000)),
            "rotary_percent": (model.rotary_percent, "partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)),
            "untie_embeddings_and_output_weights": (
                model.untie_embeddings_and_output_weights,
                "an output layer of its own:",
                not self._is_tied(),
            ),
            "add_qkv_bias": (model.add_qkv_bias, "q_proj.bias:", first + "q_proj.bias" in self._tensors),
            "qk_layernorm": (model.qk_layernorm, "q_norm:", first + "q_norm.weight" in self._tensors),
            "swiglu": (model.swiglu, "a gated SiLU:", get("hidden_act", "silu") == "silu"),
            "normalization": (model.normalization, "normalization", "RMSNorm"),
            "position_embedding_type": (model.position_embedding_type, "positions", "rope"),
            "add_bias_linear": (model.add_bias_linear, "mlp_bias", get("mlp_bias", False)),
            "multi_latent_attention": (model.multi_latent_attention, "latent attention:", False),
        }

    def _is_tied(self) -> bool:
        return self.config.get("tie_word_embeddings", "lm_head.weight" not in self._tensors)

    def _copy(self, sources: tuple[str, ...], parameter: Tensor) -> None:
        parts = [self._tensors[name](name) for name in sources]
        if len(parts) == 3:  # query, key and value: side by side in each group, as Megatron has them
            groups = self.config.get("num_key_value_heads") or self.config["num_attention_heads"]
            weight = torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)
        else:
            weight = torch.cat(parts)
        rows = len(weight)
        if sources[0] in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = min(rows, len(parameter))
        elif weight.shape != parameter.shape:
            raise ValueError(f"{self.folder}: {', '.join(sources)}: {list(weight.shape)}, not {list(parameter.shape)}")
        parameter[:rows].copy_(weight[:rows])
        parameter[rows:].zero_()

    def _vocabulary_note(self, rows: int) -> list[str]:
        theirs = self.config["vocab_size"]
        if theirs > rows:
            return [f"dropped: rows {rows} to {theirs - 1} of the vocabulary, which the job's tokenizer does not use"]
        return [f"new: rows {theirs} to {rows - 1} of the vocabulary, its padding, at 0"] if theirs < rows else []

    def _read_config(self) -> dict[str, Any]:
        path = self.folder / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            kind = config.get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}: {error}") from None
        if kind not in _MODEL_TYPES:
            raise ValueError(f"{path}: model_type {kind!r} is none of {', '.join(_MODEL_TYPES)}")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise ValueError(f"{path}: rope_type {rope_type!r}; a job has plain RoPE, `default`")
        if config.get("use_sliding_window"):
            raise ValueError(f"{path}: use_sliding_window true; a job's layers are dense or NSA, so false")
        if not isinstance(config.get("vocab_size"), int):
            raise ValueError(f"{path}: vocab_size {config.get('vocab_size')!r} is not a number")
        return config

    def _open_tensors(self) -> dict[str, Callable[[str], Tensor]]:
        """Each tensor's name to the function that reads it."""
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError:
            raise ValueError("safetensors is not installed; pip install 'mindspeed_nsa[huggingface]' brings it") from None
        files = sorted(self.folder.glob("model*.safetensors"))
        if not files:
            raise ValueError(f"{self.folder}: no model*.safetensors beside config.json")
        tensors: dict[str, Callable[[str], Tensor]] = {}
        for path in files:
            try:
                opened = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: {error}") from None
            tensors |= dict.fromkeys(opened.keys(), opened.get_tensor)
        return tensors


def _sources(name: str) -> tuple[str, ...]:
    """The tensors of a Hugging Face model that make up a parameter of Megatron's."""
    if name in _NAMES:
        return (_NAMES[name],)
    layer = _LAYER.fullmatch(name)
    assert layer, name
    number, module, kind = layer.groups()
    return tuple(f"model.layers.{number}.{part}.{kind}" for part in _LAYER_NAMES[module])


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, (int, float)):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return ours == theirs
