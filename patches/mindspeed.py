"""Native Sparse Attention as a feature of MindSpeed: a job's flags, what they are checked against, and five patches.

A feature joins before MindSpeed's adaptor is imported, because that import applies every patch: `join` first, then the adaptor.
`mindspeed_nsa.megatron_adaptor` does both. The patches are wrappers around functions of Megatron-LM, which MindSpeed stacks on
whatever other features have put there; without the flag there are none. They are catalogued in `patches/__init__.py`.
"""

import dataclasses
import functools
import pkgutil
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from typing import Any

import yaml
from mindspeed.features_manager.feature import MindSpeedFeature
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager

from mindspeed_nsa.config import NSAConfig, parse_yaml
from mindspeed_nsa.flops import dense_flops, layer_flops
from mindspeed_nsa.heads import split_heads
from mindspeed_nsa.patches import without_te
from mindspeed_nsa.patches.npu_host import agree_on_plan, uses_ascend

_VARIANT = "--experimental-attention-variant"
_WRITTEN_FOR = "NSA is written for MindSpeed master and Megatron-LM core_v0.12.1"
_OF_JOB = ("config", "v_head_dim")  # flags beside those of NSAConfig's fields


def join() -> None:
    """Add the feature to MindSpeed's; a second call changes nothing.

    MindSpeed-LLM puts a list of its own in the place of MindSpeed's: the feature joins that too.

    Raises:
        RuntimeError: MindSpeed has applied its patches, so that the feature would parse its flags and change nothing.
        ValueError: this MindSpeed has no such list.
    """
    manager = MindSpeedFeaturesManager
    missing = [name for name in ("FEATURES_LIST", "set_features_list") if not hasattr(manager, name)]
    if missing:
        raise ValueError(f"this MindSpeed's {manager.__name__} has no {', '.join(missing)}; {_WRITTEN_FOR}")
    if any(isinstance(feature, NSAFeature) for feature in manager.FEATURES_LIST):
        return
    adaptor = sys.modules.get("mindspeed.megatron_adaptor")
    if getattr(adaptor, "_IS_FEATURES_PATCHED", False):
        raise RuntimeError(
            "mindspeed.megatron_adaptor was imported before mindspeed_nsa.megatron_adaptor, so NSA would change nothing; "
            "import mindspeed_nsa.megatron_adaptor in its place"
        )
    feature, replace = NSAFeature(), manager.set_features_list

    def set_features_list(features_list: list[MindSpeedFeature]) -> None:
        replace([*features_list, feature])

    manager.set_features_list = set_features_list
    manager.FEATURES_LIST.append(feature)


class NSAFeature(MindSpeedFeature):
    """The feature. Its settings are those of the command line when the adaptor is imported, which is when patches are chosen.

    Attributes:
        nsa: what was patched in; None: nothing was.
        v_head_dim: dim of the values of GQA layers; None: that of the keys.
    """

    def __init__(self) -> None:
        super().__init__("nsa-config")
        self.nsa: NSAConfig | None = None
        self.v_head_dim: int | None = None

    def is_need_apply(self, args: Any) -> bool:
        """Whether a flag turns NSA on, at any optimization level."""
        nsa = read_settings(args)
        return nsa is not None and nsa.enabled

    def register_args(self, parser: ArgumentParser) -> None:
        """Add `--nsa-config`, `--nsa-v-head-dim` and a flag for each field of NSAConfig."""
        group = parser.add_argument_group(title="native sparse attention")
        group.add_argument("--nsa-config", metavar="FILE", help="turns NSA on: a job file, or one with only an `nsa:` section")
        group.add_argument(
            "--nsa-v-head-dim", type=int, help="dim of the values of GQA layers; default --kv-channels. MLA has --v-head-dim"
        )
        for name, field in NSAConfig.model_fields.items():
            group.add_argument(_flag(name), type=_value, metavar="VALUE", help=f"nsa.{name}; default {field.default}")
        self.add_parser_argument_choices_value(parser, _VARIANT, "nsa")

    def register_patches(self, patch_manager: Any, args: Any) -> None:
        """Register the wrappers.

        Raises:
            ValueError: this Megatron-LM lacks a target.
        """
        self.nsa = read_settings(args)
        self.v_head_dim = getattr(args, "nsa_v_head_dim", None)
        for target, wrapper in self.patches().items():
            try:
                pkgutil.resolve_name(target)
            except (ImportError, AttributeError):
                raise ValueError(f"this Megatron-LM has no {target}, which NSA wraps; {_WRITTEN_FOR}") from None
            patch_manager.register_patch(target, wrapper)

    def patches(self) -> dict[str, Callable]:
        """The wrappers by their targets. MindSpeed tells wrappers from replacements by the end of their names."""
        return {
            "megatron.core.transformer.transformer_block._get_block_submodules": self.submodules_wrapper,
            "megatron.core.transformer.transformer_block.TransformerBlock.sharded_state_dict": self.sharded_state_dict_wrapper,
            "megatron.training.training.get_model": self.get_model_wrapper,
            "megatron.training.training.train_step": self.train_step_wrapper,
            "megatron.training.training.num_floating_point_operations": self.flops_wrapper,
            **without_te.write_item(),
        }

    def validate_args(self, args: Any) -> None:
        """Check a job; MindSpeed calls this with its arguments, and with every configuration made of them.

        Raises:
            ValueError: NSA was asked for and is not patched in, or cannot work in this job.
        """
        asked = read_settings(args)
        if asked is not None and asked.enabled and self.nsa is None:
            raise ValueError(
                "--nsa-config was read too late: no patch of NSA is in place, and the job would train dense attention"
            )
        if self.nsa is not None:
            check_job(self.nsa, args)

    def submodules_wrapper(self, get_submodules: Callable) -> Callable:
        """Megatron's `_get_block_submodules`, with NSA in the layers that `nsa.layers` names.

        Every spec of a decoder comes through it: Megatron's own, local or Transformer Engine's, of MoE blocks, and the user's.
        """

        @functools.wraps(get_submodules)
        def with_nsa(config: Any, *rest: Any, **named: Any) -> Any:
            from megatron.core.transformer import transformer_layer  # once MindSpeed has patched what is imported of it

            from mindspeed_nsa.patches import megatron_core

            submodules = get_submodules(config, *rest, **named)
            first = transformer_layer.get_transformer_layer_offset(config)
            how: dict[str, Any] = {"num_layers": config.num_layers, "first_layer": first, "v_head_dim": self.v_head_dim}
            layers = megatron_core.with_nsa(submodules.layer_specs, self._settings, **how)
            return dataclasses.replace(submodules, layer_specs=layers)

        return with_nsa

    def sharded_state_dict_wrapper(self, sharded_state_dict: Callable) -> Callable:
        """Megatron's `TransformerBlock.sharded_state_dict`, told that layers differ where only some have NSA."""

        @functools.wraps(sharded_state_dict)
        def told(block: Any, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
            total = block.config.num_layers
            if len(self._settings.nsa_layers(total)) < total:
                metadata = {**(metadata or {}), "non_homogeneous_layers": True}
            return sharded_state_dict(block, prefix, sharded_offsets, metadata)

        return told

    def get_model_wrapper(self, get_model: Callable) -> Callable:
        """Megatron's `get_model`: the operators are probed before the model is built, and its cores looked at afterwards."""

        @functools.wraps(get_model)
        def checked(*given: Any, **named: Any) -> Any:
            from megatron.training import global_vars

            from mindspeed_nsa.patches import megatron_core

            args = global_vars.get_args()
            agree_on_plan(self._settings, _group(args))
            model = get_model(*given, **named)
            megatron_core.check_swapped(model, self._settings.nsa_layers(args.num_layers))
            return model

        return checked

    def train_step_wrapper(self, train_step: Callable) -> Callable:
        """Megatron's `train_step`: at the job's log interval the NSA layers' statistics go to its TensorBoard."""

        @functools.wraps(train_step)
        def watched(forward_step: Any, data: Any, model: Any, *rest: Any, **named: Any) -> Any:
            from megatron.training import global_vars

            from mindspeed_nsa.patches import megatron_core

            args = global_vars.get_args()
            iteration = args.curr_iteration + 1
            if not args.tensorboard_dir or iteration % args.log_interval:
                return train_step(forward_step, data, model, *rest, **named)
            megatron_core.collect_statistics(model, True)
            result = train_step(forward_step, data, model, *rest, **named)
            megatron_core.collect_statistics(model, False)
            layers = megatron_core.gather_statistics(model)
            if writer := global_vars.get_tensorboard_writer():
                for layer, values in layers.items():
                    for name, value in values.items():
                        writer.add_scalar(f"nsa/layer_{layer}/{name}", value, iteration)
            return result

        return watched

    def flops_wrapper(self, count: Callable) -> Callable:
        """Megatron's `num_floating_point_operations`, with the attention of NSA layers for the dense one that it counts."""

        @functools.wraps(count)
        def counted(args: Any, batch_size: int) -> float:
            return count(args, batch_size) + 3 * batch_size * self._more_flops(args)

        return counted

    def _more_flops(self, args: Any) -> int:
        """What all layers of a forward pass on one sequence take beyond what Megatron counts; it is mostly less."""
        layers = set(self._settings.nsa_layers(args.num_layers)) - set(getattr(args, "noop_layers", None) or ())
        length, heads, groups = args.seq_length, args.num_attention_heads, _key_value_heads(args)
        if args.multi_latent_attention:
            qk_dim, v_dim = args.qk_head_dim + args.qk_pos_emb_head_dim, args.v_head_dim
            counted = dense_flops(length, heads, qk_dim, v_dim)
        else:
            qk_dim, v_dim = args.kv_channels, self.v_head_dim or args.kv_channels
            counted = dense_flops(length, heads, qk_dim, qk_dim)
            counted += 2 * length * args.hidden_size * (heads + groups) * (qk_dim - v_dim)
        nsa = layer_flops(self._settings, length, heads, groups, qk_dim, v_dim, args.hidden_size)
        return len(layers) * (nsa.total - counted)

    @property
    def _settings(self) -> NSAConfig:
        assert self.nsa is not None
        return self.nsa


def read_settings(args: Any) -> NSAConfig | None:
    """The settings that a job's arguments ask for; None without a flag that turns NSA on.

    Args:
        args: a namespace, in which any argument may be missing.

    Raises:
        ValueError: a setting is wrong, or a flag alters settings that are not there.
    """
    given = {name: getattr(args, f"nsa_{name}", None) for name in (*NSAConfig.model_fields, *_OF_JOB)}
    given = {name: value for name, value in given.items() if value is not None}
    variant = getattr(args, "experimental_attention_variant", None)
    if "config" not in given and variant != "nsa":
        if given:
            raise ValueError(f"{_flag(next(iter(given)))}: NSA is not turned on; add --nsa-config FILE or {_VARIANT} nsa")
        return None
    if variant not in (None, "nsa"):
        raise ValueError(f"{_VARIANT} {variant}: --nsa-config asks for NSA; allowed beside it: nsa")
    path = given.get("config")
    settings = {} if path is None else NSAConfig.from_yaml(path).model_dump()
    try:
        return NSAConfig(**settings | {name: value for name, value in given.items() if name not in _OF_JOB})
    except ValueError as error:
        raise ValueError(f"nsa.{error}") from None


def check_job(nsa: NSAConfig, args: Any) -> None:
    """Refuse what NSA cannot do in a MindSpeed job, and what would silently train something else.

    Raises:
        ValueError: names the argument, what is allowed, and why.
    """
    for name, (refused, why) in _REFUSED.items():
        given = getattr(args, name, None)
        if given is not None and refused(given):
            raise ValueError(f"--{name.replace('_', '-')} {given} does not go with NSA: {why}")
    if getattr(args, "multi_latent_attention", False):
        from mindspeed_nsa.patches.megatron_core import check_latent

        check_latent(nsa)
    if uses_ascend(nsa) and not (getattr(args, "bf16", False) or getattr(args, "fp16", False)):
        raise ValueError("float32 does not go with NSA on an NPU, whose operators take half types; add --bf16")
    if hasattr(args, "num_layers"):
        nsa.nsa_layers(int(args.num_layers))


# When an argument is refused, and why.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "context_parallel_size": (
        lambda size: int(size) > 1,
        "each rank would attend to its own part of the sequence alone; allowed: 1",
    ),
    "attention_dropout": (lambda rate: float(rate) > 0, "its operators drop nothing; allowed: 0"),
    "position_embedding_type": (
        lambda kind: kind in ("alibi", "relative"),
        "its scores take no bias; allowed: rope, yarn, none",
    ),
    "mtp_num_layers": (lambda count: int(count) > 0, "the layers of multi-token prediction would stay dense; leave it out"),
    "use_legacy_models": (bool, "legacy models have no layer specs; leave it out"),
    "tp_2d": (bool, "it splits the hidden dim of projections that NSA adds to; leave it out"),
    "moe_fb_overlap": (bool, "it runs the parts of a layer by itself, without the gates; leave it out"),
}


def _group(args: Any) -> int:
    """Query heads a key/value head on this rank."""
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    split = split_heads(args.num_attention_heads, _key_value_heads(args), *tensor)
    return split.head_num // split.kv_head_num


def _key_value_heads(args: Any) -> int:
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def _value(text: str) -> Any:
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise ArgumentTypeError(f"{text!r} is not YAML") from None
    return text if isinstance(value, dict) else value  # such as the slice `1:`, which YAML takes for a mapping


def _flag(name: str) -> str:
    return f"--nsa-{name.replace('_', '-')}"
