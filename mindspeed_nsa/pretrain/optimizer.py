"""A job's data parallelism and optimizer: Megatron-core's."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from mindspeed_nsa.pretrain.job import Job


def wrap(job: Job, runs: list[GPTModel]) -> list[DistributedDataParallel]:
    """Put a rank's runs of layers into Megatron's data parallelism, in bfloat16 if the job says so."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=job.parallel.use_distributed_optimizer
    )
    models: list[DistributedDataParallel] = []
    for gpt in runs:
        inner = Float16Module(gpt.config, gpt) if job.training.bf16 else gpt
        # As Megatron's own training: only the gradients of the run that ends backward last are reduced in buckets.
        models.append(DistributedDataParallel(gpt.config, settings, inner, disable_bucketing=bool(models)))
        models[-1].broadcast_params()
    return models


def build_optimizer(job: Job, models: list[DistributedDataParallel]) -> tuple[Any, OptimizerParamScheduler]:
    """Megatron's Adam and the schedule of its learning rate, in samples."""
    training = job.training
    config = OptimizerConfig(
        optimizer="adam",
        lr=training.lr,
        min_lr=training.min_lr,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_eps=training.adam_eps,
        clip_grad=training.clip_grad,
        bf16=training.bf16,
        params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
        use_distributed_optimizer=job.parallel.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, models)
    samples = training.global_batch_size
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=training.lr_warmup_iters * samples,
        lr_decay_steps=training.decay_iters * samples,
        lr_decay_style=training.lr_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.train_iters * samples,
        wd_incr_style="constant",
        # A run that is loaded goes on under the job's schedule, not the stored one.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
