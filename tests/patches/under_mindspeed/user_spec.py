"""A layer spec of the user, as `--spec user_spec layer` names it."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

layer = get_gpt_layer_local_spec(normalization="RMSNorm")
