"""A job file as the command-line flags of Megatron-LM's `pretrain_gpt.py` under MindSpeed.

The keys of a job file are Megatron's argument names, so most are handed on as they are. All are, those left at their
defaults too: Megatron's differ from the job file's (dropout, biases, positions, normalization, ...).
"""

import math
from pathlib import Path
from typing import Any

from mindspeed_nsa.pretrain.job import Job

# What the trainer here does that Megatron-LM does by choice, and what it would do by kernels for CUDA.
_ALWAYS = {
    "accumulate_allreduce_grads_in_fp32": True,
    "no_create_attention_mask_in_dataloader": True,
    "no_gradient_accumulation_fusion": True,
    "no_masked_softmax_fusion": True,
    "override_opt_param_scheduler": True,
}
# Megatron spells this one with underscores.
_SPELLING = {"override_opt_param_scheduler": "--override-opt_param-scheduler"}
# Arguments that would take the place of the job file, or of what `mindspeed-nsa launch` decides.
_REFUSED = {"yaml_cfg", "spec", "use_checkpoint_args", "use_legacy_models", "distributed_backend", "config_logger_dir"}


def megatron_arguments(job: Job, config: Path, overrides: list[str]) -> list[str]:
    """The flags of a job, without the program.

    Args:
        job: the job, overrides applied.
        config: its file; the `nsa:` section travels as `--nsa-config FILE`.
        overrides: those that were applied; of `nsa.` they travel as `--nsa-KEY VALUE`.

    Raises:
        ValueError: the `megatron:` section has an argument that it may not have; one line that names it.
    """
    options = {
        **_model(job),
        **dict(job.parallel),
        **_data(job),
        **_training(job),
        **_checkpoint(job),
        **_logging(job),
        **_nsa(job, config, overrides),
        **_ALWAYS,
    }
    options |= _extra(job.megatron, options)
    return [word for name, value in options.items() for word in _words(name, value)]


def left_out(job: Job) -> list[str]:
    """The keys that say something and that Megatron-LM has nothing for."""
    return ["logging.sample_tokens"] if job.logging.sample_tokens else []


def _model(job: Job) -> dict[str, Any]:
    model = job.model
    latent, experts = model.multi_latent_attention, model.num_experts is not None
    options = dict(model)
    options |= {
        "ffn_hidden_size": model.ffn_width,
        "group_query_attention": not latent,
        "num_query_groups": None if latent else model.query_groups,
        "kv_channels": model.head_width,
        "max_position_embeddings": model.max_position_embeddings or model.seq_length,
        "disable_bias_linear": not options.pop("add_bias_linear"),
        # Megatron multiplies this by the tensor-parallel size; the model's rows do not depend on the layout.
        "make_vocab_size_divisible_by": _vocabulary_multiple(job.parallel.tensor_model_parallel_size),
        "moe_router_topk": model.moe_router_topk if experts else None,
        "moe_layer_freq": model.moe_layer_freq if experts else None,
    }
    if latent:
        options["v_head_dim"] = model.value_width
        # YaRN's factor, which also scales the softmax; 1 leaves plain rotary positions.
        options["rotary_scaling_factor"] = 1.0
    else:
        # Megatron's own GQA has one dim for a head; NSA's layers are told by a flag of their own.
        options |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"))
    return options


def _vocabulary_multiple(tensor_parallel_size: int) -> int:
    return math.lcm(128, tensor_parallel_size) // tensor_parallel_size


def _data(job: Job) -> dict[str, Any]:
    data = job.data
    options = dict(data)
    options["train_data_path"] = options.pop("data_path")
    if data.tokenizer_type == "ByteTokenizer":
        # Megatron's tokenizer of numbers: 256 bytes, and the end of a document after them.
        options |= {"tokenizer_type": "NullTokenizer", "vocab_size": 256}
    elif data.tokenizer_model:
        # Megatron asks for the folder that the tokenizer.json lies in.
        options["tokenizer_model"] = str(Path(data.tokenizer_model).parent)
    return options


def _training(job: Job) -> dict[str, Any]:
    return dict(job.training) | {"lr_decay_iters": job.training.decay_iters}


def _checkpoint(job: Job) -> dict[str, Any]:
    checkpoint, load = job.checkpoint, job.checkpoint.load
    options: dict[str, Any] = dict(checkpoint) | {
        "save_interval": checkpoint.save_interval or (job.training.train_iters if checkpoint.save else None),
        # SIGTERM saves and stops.
        "exit_signal_handler": checkpoint.save is not None,
        "exit_on_missing_checkpoint": load is not None,
    }
    if load and Path(load).name.startswith("iter_"):
        options |= {"load": str(Path(load).parent), "ckpt_step": int(Path(load).name.removeprefix("iter_"))}
    return options


def _logging(job: Job) -> dict[str, Any]:
    logging = job.logging
    return {
        "log_interval": logging.log_interval,
        "tensorboard_dir": logging.run_dir if logging.tensorboard else None,
        "tensorboard_log_interval": logging.log_interval,
        "log_throughput": True,
    }


def _nsa(job: Job, config: Path, overrides: list[str]) -> dict[str, Any]:
    if not job.nsa.enabled:
        return {}
    single = dict(override.removeprefix("nsa.").split("=", 1) for override in overrides if override.startswith("nsa."))
    options = {"nsa_config": str(config)} | {f"nsa_{key}": value for key, value in single.items()}
    return options | {"nsa_v_head_dim": None if job.model.multi_latent_attention else job.model.v_head_dim}


def _extra(section: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The `megatron:` section, checked as far as that can be without Megatron."""
    extra = {name.replace("-", "_"): value for name, value in section.items()}
    for name, value in extra.items():
        if name in options:
            raise ValueError(f"megatron.{name}: follows from the other sections of the job file; change it there")
        if name in _REFUSED or name.startswith("nsa_"):
            raise ValueError(f"megatron.{name}: not allowed here, because the job file and the launch decide it")
        if value is None or value is False or isinstance(value, dict):
            raise ValueError(
                f"megatron.{name}: {value}; allowed: true for an option without value, a text, a number or a list; "
                "what is off is left out"
            )
    return extra


def _words(name: str, value: Any) -> list[str]:
    """An option as words of a command line; None and False are left out."""
    option = _SPELLING.get(name, "--" + name.replace("_", "-"))
    if value is None or value is False:
        return []
    if value is True:
        return [option]
    return [option, *map(str, value if isinstance(value, list) else [value])]
