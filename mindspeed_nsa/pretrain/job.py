"""Job files: a YAML mapping whose keys are Megatron's argument names, checked whole before anything is started."""

import importlib.metadata
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from mindspeed_nsa.config import NSAConfig, Section, parse_yaml, read_yaml
from mindspeed_nsa.heads import HeadSplit, split_heads


class ModelSection(Section):
    """The model. Keys that only Multi-Latent Attention reads need `multi_latent_attention: true`.

    Args:
        ffn_hidden_size: defaults to 4 * hidden_size, with `swiglu` to 8/3 of it in whole 64s.
        num_query_groups: key and value heads, defaults to num_attention_heads.
        kv_channels: width of a query and key head, defaults to hidden_size / num_attention_heads.
        v_head_dim: width of a value head, defaults to kv_channels; to 128 for Multi-Latent Attention.
        max_position_embeddings: longest sequence of learned positions, defaults to seq_length.
        attention_dropout: 0, because the attention operators have none.
        num_experts: routed experts of a Mixture of Experts, none by default.
        moe_layer_freq: which layers have experts: 1, all of them, or a pattern such as `([0]*1+[1]*29)`.
        moe_ffn_hidden_size: width of one routed expert, defaults to that of a dense layer.
        moe_shared_expert_intermediate_size: width of all shared experts together, none by default.
        moe_router_topk: experts that each token is sent to.
    """

    num_layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    ffn_hidden_size: int | None = Field(None, ge=1)
    num_attention_heads: int = Field(ge=1)
    num_query_groups: int | None = Field(None, ge=1)
    kv_channels: int | None = Field(None, ge=1)
    v_head_dim: int | None = Field(None, ge=1)
    seq_length: int = Field(ge=1)
    max_position_embeddings: int | None = Field(None, ge=1)
    position_embedding_type: Literal["rope", "learned_absolute", "none"] = "rope"
    rotary_base: int = Field(10000, ge=1)
    rotary_percent: float = Field(1.0, gt=0, le=1)
    normalization: Literal["LayerNorm", "RMSNorm"] = "RMSNorm"
    norm_epsilon: float = Field(1e-5, gt=0)
    swiglu: bool = False
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = False
    init_method_std: float = Field(0.02, gt=0)
    qk_layernorm: bool = False
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    attention_dropout: float = Field(0.0, ge=0, le=0)
    multi_latent_attention: bool = False
    q_lora_rank: int | None = Field(None, ge=1)
    kv_lora_rank: int = Field(512, ge=1)
    qk_head_dim: int = Field(128, ge=1)
    qk_pos_emb_head_dim: int = Field(64, ge=1)
    num_experts: int | None = Field(None, ge=1)
    moe_layer_freq: int | str = 1
    moe_ffn_hidden_size: int | None = Field(None, ge=1)
    moe_shared_expert_intermediate_size: int | None = Field(None, ge=1)
    moe_router_topk: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _check_heads(self) -> "ModelSection":
        heads, groups = self.num_attention_heads, self.query_groups
        if heads % groups:
            raise ValueError(f"num_query_groups: {groups} does not divide num_attention_heads {heads}")
        if self.kv_channels is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size: {self.hidden_size} does not divide by num_attention_heads {heads}; "
                "set kv_channels to choose the width of a head"
            )
        if self.max_position_embeddings is not None and self.max_position_embeddings < self.seq_length:
            raise ValueError(
                f"max_position_embeddings: {self.max_position_embeddings} is less than seq_length {self.seq_length}"
            )
        if self.multi_latent_attention:
            if self.query_groups != heads:
                raise ValueError(f"num_query_groups: {groups} with multi_latent_attention, which has one for each head")
            if self.position_embedding_type != "rope":
                raise ValueError("position_embedding_type: multi_latent_attention takes rope alone")
        elif given := sorted(_LATENT_ONLY & self.model_fields_set):
            raise ValueError(f"{given[0]}: only multi_latent_attention reads it, which is false")
        return self

    @model_validator(mode="after")
    def _check_experts(self) -> "ModelSection":
        given = sorted(key for key in self.model_fields_set if key.startswith("moe_"))
        if self.num_experts is None:
            if given:
                raise ValueError(f"{given[0]}: only a Mixture of Experts reads it; num_experts is not set")
            return self
        if self.moe_router_topk > self.num_experts:
            raise ValueError(f"moe_router_topk: {self.moe_router_topk} is more than num_experts {self.num_experts}")
        if self.moe_layer_freq != 1 and not _LAYER_PATTERN.fullmatch(str(self.moe_layer_freq)):
            raise ValueError(f"moe_layer_freq: {self.moe_layer_freq!r} is neither 1 nor a pattern such as `([0]*1+[1]*29)`")
        if len(self.expert_layers) != self.num_layers:
            raise ValueError(
                f"moe_layer_freq: {self.moe_layer_freq} is of {len(self.expert_layers)} layers, not {self.num_layers}"
            )
        return self

    @property
    def expert_layers(self) -> list[bool]:
        """Whether each layer has experts."""
        if self.num_experts is None or self.moe_layer_freq == 1:
            return [self.num_experts is not None] * self.num_layers
        runs = re.findall(r"\[([01])\](?:\*(\d+))?", str(self.moe_layer_freq))
        return [kind == "1" for kind, count in runs for _ in range(int(count or 1))]

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward network of a layer without experts."""
        if self.ffn_hidden_size:
            return self.ffn_hidden_size
        # A gated network has three matrices for two: 2/3 of the width keeps its size, in whole 64s as Megatron has it.
        return int(4 * self.hidden_size * 2 / 3) // 64 * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def value_width(self) -> int:
        """Width of a value head."""
        return self.v_head_dim or (128 if self.multi_latent_attention else self.head_width)

    @property
    def query_groups(self) -> int:
        """Key and value heads of the whole model."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of a query and key head, the rotary part of Multi-Latent Attention included."""
        if self.multi_latent_attention:
            return self.qk_head_dim + self.qk_pos_emb_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads


_LATENT_ONLY = {"q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"}
_LAYER_PATTERN = re.compile(r"\(\[[01]\](\*\d+)?(\+\[[01]\](\*\d+)?)*\)")


class ParallelSection(Section):
    """How the model and its work are laid over the ranks.

    Args:
        num_layers_per_virtual_pipeline_stage: a pipeline rank holds several runs of so many layers, interleaved with those
            of the other ranks; default: one run.
        cp_comm_type: how context-parallel ranks share a sequence: `a2a` hands each some heads of all of it (Ulysses),
            `all_gather` all keys and values to the queries of its own pieces.
        expert_model_parallel_size: ranks that share the experts of a layer.
        expert_tensor_parallel_size: ranks that share one expert, defaults to tensor_model_parallel_size.
    """

    tensor_model_parallel_size: int = Field(1, ge=1)
    pipeline_model_parallel_size: int = Field(1, ge=1)
    num_layers_per_virtual_pipeline_stage: int | None = Field(None, ge=1)
    context_parallel_size: int = Field(1, ge=1)
    cp_comm_type: Literal["a2a", "all_gather"] | None = None
    expert_model_parallel_size: int = Field(1, ge=1)
    expert_tensor_parallel_size: int | None = Field(None, ge=1)
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "ParallelSection":
        if (self.context_parallel_size > 1) != (self.cp_comm_type is not None):
            raise ValueError(
                f"cp_comm_type: {self.cp_comm_type} with context_parallel_size {self.context_parallel_size}; "
                "context parallelism needs a2a or all_gather, and nothing else takes it"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError("sequence_parallel: needs tensor_model_parallel_size of 2 or more")
        full = self.recompute_granularity == "full"
        if full and (self.recompute_method is None or self.recompute_num_layers is None):
            raise ValueError("recompute_granularity: full needs recompute_method and recompute_num_layers")
        if not full and (self.recompute_method or self.recompute_num_layers):
            raise ValueError("recompute_method: it and recompute_num_layers go with recompute_granularity: full")
        return self


class DataSection(Section):
    """What to train on; paths are dataset prefixes, `.bin` and `.idx` are added to them.

    Args:
        data_path: the text to train on, written by `mindspeed-nsa prepare`.
        valid_data_path: held-out text.
        tokenizer_model: path of the `tokenizer.json` of a HuggingFaceTokenizer.
        data_cache_path: folder for Megatron's shuffled indices, beside the data by default.
        num_workers: processes that read ahead; 0 reads in the training process.
        reset_attention_mask: documents packed into one sequence do not see each other.
        reset_position_ids: positions start anew with each document.
        eod_mask_loss: no loss on what follows from an end of document.
    """

    data_path: str
    valid_data_path: str | None = None
    tokenizer_type: Literal["ByteTokenizer", "HuggingFaceTokenizer"] = "ByteTokenizer"
    tokenizer_model: str | None = None
    data_cache_path: str | None = None
    num_workers: int = Field(0, ge=0)
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False

    @model_validator(mode="after")
    def _check(self) -> "DataSection":
        if self.reset_attention_mask != self.reset_position_ids:
            raise ValueError(
                "reset_attention_mask: goes with reset_position_ids, because a document that sees itself alone "
                "starts at position 0; set both or none"
            )
        return self

    def check_files(self) -> None:
        """Check that the files that the section names are there.

        Raises:
            ValueError: one is not; one line that names it.
        """
        for key in ("data_path", "valid_data_path"):
            for suffix in (".bin", ".idx"):
                if (prefix := getattr(self, key)) and not Path(prefix + suffix).is_file():
                    raise ValueError(f"data.{key}: {prefix}{suffix}: no such file; `mindspeed-nsa prepare` writes datasets")
        if self.tokenizer_type == "HuggingFaceTokenizer" and not Path(self.tokenizer_model or "").is_file():
            raise ValueError(f"data.tokenizer_model: {self.tokenizer_model}: no such file; it should be a tokenizer.json")


class TrainingSection(Section):
    """How long and how to train. Batch sizes are in sequences.

    Args:
        bf16: parameters and activations in bfloat16 with an fp32 copy in the optimizer; fp32 otherwise.
        lr_decay_iters: iterations over which the learning rate falls to min_lr, defaults to train_iters.
        eval_interval: iterations between two evaluations; one more comes before the first and after the last.
        eval_iters: global batches of held-out text in an evaluation; 0 does without.
    """

    train_iters: int = Field(ge=1)
    micro_batch_size: int = Field(1, ge=1)
    global_batch_size: int = Field(ge=1)
    seed: int = Field(1234, ge=0, lt=2**31)
    bf16: bool = False
    lr: float = Field(gt=0)
    min_lr: float = Field(0.0, ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = "cosine"
    lr_warmup_iters: int = Field(0, ge=0)
    lr_decay_iters: int | None = Field(None, ge=1)
    weight_decay: float = Field(0.01, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, ge=0)
    eval_interval: int = Field(100, ge=1)
    eval_iters: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "TrainingSection":
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr: {self.min_lr} is more than lr {self.lr}")
        if self.lr_warmup_iters >= self.decay_iters:
            raise ValueError(
                f"lr_warmup_iters: {self.lr_warmup_iters} is not less than the {self.decay_iters} iterations of decay"
            )
        return self

    @property
    def decay_iters(self) -> int:
        """Iterations over which the learning rate decays."""
        return self.lr_decay_iters or self.train_iters


class CheckpointSection(Section):
    """Where to save and what to go on from.

    Args:
        save: folder for checkpoints; the last iteration, and one that is stopped, is saved there too.
        load: such a folder, for its latest checkpoint, or one `iter_` folder in it.
        save_interval: iterations between two checkpoints.
    """

    save: str | None = None
    load: str | None = None
    save_interval: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "CheckpointSection":
        if self.save_interval and not self.save:
            raise ValueError("save_interval: needs a folder in save")
        return self


class LoggingSection(Section):
    """What a run shows and leaves behind.

    Args:
        run_dir: folder for `metrics.jsonl` and TensorBoard's files.
        log_interval: iterations between two lines on the terminal, and two points in TensorBoard.
        tensorboard: write TensorBoard's files.
        sample_tokens: tokens of the continuation of held-out text that ends the run; 0 does without.
    """

    run_dir: str = "runs/latest"
    log_interval: int = Field(1, ge=1)
    tensorboard: bool = True
    sample_tokens: int = Field(0, ge=0)


class Job(Section):
    """A pretraining job, as its file and the overrides on the command line give it.

    `megatron` holds further arguments of Megatron-LM and MindSpeed by name, for `mindspeed-nsa launch`; the trainer here
    does not read them.
    """

    model: ModelSection
    nsa: NSAConfig = NSAConfig()
    parallel: ParallelSection = ParallelSection()
    data: DataSection
    training: TrainingSection
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    megatron: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Job":
        """Read a job file and check it against itself.

        Args:
            path: the job file.
            overrides: `section.key=value` each, the value in YAML.

        Raises:
            ValueError: one line that names the file, the key and what is allowed.
        """
        content = read_content(path, overrides)
        try:
            return cls(**content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Job":
        """Read a job file for the trainer here: checked also against the files it names and the number of ranks.

        Raises:
            ValueError: as `read` does.
        """
        job = cls.read(path, overrides)
        try:
            job.data.check_files()
            job.check_layout(int(os.environ.get("WORLD_SIZE", "1")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return job

    @model_validator(mode="after")
    def _check_sections(self) -> "Job":
        model, parallel, training = self.model, self.parallel, self.training
        tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        if model.num_attention_heads % tensor:
            raise ValueError(
                f"parallel.tensor_model_parallel_size: {tensor} does not divide num_attention_heads {model.num_attention_heads}"
            )
        if model.query_groups % tensor and tensor % model.query_groups:
            raise ValueError(
                f"parallel.tensor_model_parallel_size: {tensor} and num_query_groups {model.query_groups}: "
                "one must divide the other"
            )
        if parallel.sequence_parallel and model.seq_length % tensor:
            raise ValueError(
                f"model.seq_length: {model.seq_length} does not divide by tensor_model_parallel_size {tensor}, "
                "as sequence_parallel needs"
            )
        if model.num_layers % pipeline:
            raise ValueError(f"model.num_layers: {model.num_layers} does not divide by pipeline_model_parallel_size {pipeline}")
        run = parallel.num_layers_per_virtual_pipeline_stage
        if run and (pipeline == 1 or model.num_layers // pipeline % run or model.num_layers // pipeline == run):
            raise ValueError(
                f"parallel.num_layers_per_virtual_pipeline_stage: {run} does not part the layers of a pipeline rank, "
                f"{model.num_layers // pipeline}, into several runs; it needs 2 or more pipeline ranks"
            )
        if parallel.context_parallel_size > 1:
            self._check_context_parallel()
        if self.data.reset_attention_mask and training.micro_batch_size != 1:
            raise ValueError(
                f"training.micro_batch_size: {training.micro_batch_size}; reset_attention_mask packs documents into "
                "one sequence, so 1"
            )
        if training.eval_iters and self.data.valid_data_path is None:
            raise ValueError("data.valid_data_path: evaluation needs one; training.eval_iters: 0 does without")
        if self.logging.sample_tokens and (
            self.data.valid_data_path is None or pipeline > 1 or parallel.context_parallel_size > 1
        ):
            raise ValueError(
                "logging.sample_tokens: needs data.valid_data_path, pipeline_model_parallel_size 1 and context_parallel_size 1"
            )
        experts = parallel.expert_model_parallel_size
        if model.num_experts is None and (experts > 1 or parallel.expert_tensor_parallel_size):
            raise ValueError("parallel.expert_model_parallel_size: it and expert_tensor_parallel_size need model.num_experts")
        if model.num_experts is not None and model.num_experts % experts:
            raise ValueError(f"parallel.expert_model_parallel_size: {experts} does not divide num_experts {model.num_experts}")
        if isinstance(self.nsa.layers, list) and max(self.nsa.layers, default=0) >= model.num_layers:
            raise ValueError(f"nsa.layers: {self.nsa.layers} goes past num_layers {model.num_layers}, counted from 0")
        return self

    @property
    def pipeline_runs(self) -> int:
        """Runs of layers that a pipeline rank holds."""
        layers = self.model.num_layers // self.parallel.pipeline_model_parallel_size
        return layers // (self.parallel.num_layers_per_virtual_pipeline_stage or layers)

    @property
    def held_heads(self) -> HeadSplit:
        """The heads that the first tensor-parallel rank holds; the others hold as many."""
        return split_heads(self.model.num_attention_heads, self.model.query_groups, self.parallel.tensor_model_parallel_size, 0)

    @property
    def run_heads(self) -> HeadSplit:
        """The heads that the attention of the first rank runs: those held, with `a2a` a part of them."""
        held = self.held_heads
        if self.parallel.cp_comm_type != "a2a":
            return held
        return split_heads(held.head_num, held.kv_head_num, self.parallel.context_parallel_size, 0, "context_parallel_size")

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that train on different sequences."""
        parallel = self.parallel
        return world_size // (
            parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        )

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches of a rank in a step."""
        return self.training.global_batch_size // (self.training.micro_batch_size * self.data_parallel_size(world_size))

    def _check_context_parallel(self) -> None:
        model, context, tensor = self.model, self.parallel.context_parallel_size, self.parallel.tensor_model_parallel_size
        pieces = 2 * context * (tensor if self.parallel.sequence_parallel else 1)
        if model.seq_length % pieces:
            raise ValueError(
                f"model.seq_length: {model.seq_length} is not a multiple of {pieces}: two pieces a context-parallel rank"
                f"{', split again by sequence_parallel' * self.parallel.sequence_parallel}"
            )
        if not self.nsa.enabled or self.nsa.nsa_layers(model.num_layers) != list(range(model.num_layers)):
            raise ValueError(
                f"parallel.context_parallel_size: {context}; dense layers need whole sequences, so nsa.enabled: true and "
                "nsa.layers: all, or 1"
            )
        if self.parallel.cp_comm_type == "a2a":
            try:
                _ = self.run_heads
            except ValueError as error:
                raise ValueError(
                    f"parallel.context_parallel_size: of the heads of a tensor-parallel rank, {error}; all_gather takes any"
                ) from None

    def check_mindspeed(self) -> None:
        """Check that a MindSpeed job can do what the trainer here can.

        Raises:
            ValueError: it cannot; one line that names the key.
        """
        if self.parallel.context_parallel_size > 1:
            raise ValueError(
                f"parallel.context_parallel_size: {self.parallel.context_parallel_size}; the trainer here splits sequences, a "
                "MindSpeed job with NSA does not, so 1"
            )

    def check_layout(self, world_size: int, version: tuple[int, int] | None = None) -> None:
        """Check what depends on the number of ranks and on Megatron-core.

        Args:
            world_size: the ranks.
            version: Megatron-core's major and minor version; default: of the one that is installed.

        Raises:
            ValueError: the job does not fit; one line that names the key.
        """
        self._check_ranks(world_size)
        parallel, version = self.parallel, version or megatron_version()
        if parallel.context_parallel_size > 1 and self.data.reset_attention_mask and version < (0, 16):
            raise ValueError(
                "parallel.context_parallel_size: with data.reset_attention_mask it needs megatron-core 0.16, which turns the "
                f"positions of packed documents apart from their bounds; here is {version[0]}.{version[1]}"
            )
        tensor = parallel.tensor_model_parallel_size
        if tensor > self.model.query_groups and version < (0, 16):
            raise ValueError(
                f"parallel.tensor_model_parallel_size: {tensor} is more than num_query_groups "
                f"{self.model.query_groups}, which megatron-core splits over ranks from 0.16 on; "
                f"here is {version[0]}.{version[1]}"
            )

    def _check_ranks(self, world_size: int) -> None:
        parallel, tensor = self.parallel, self.parallel.tensor_model_parallel_size
        ranks = tensor * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        if world_size % ranks:
            raise ValueError(
                f"parallel.tensor_model_parallel_size: {tensor} * pipeline_model_parallel_size "
                f"{parallel.pipeline_model_parallel_size} * context_parallel_size {parallel.context_parallel_size} does not "
                f"divide the {world_size} ranks that were started"
            )
        data = self.data_parallel_size(world_size)
        if self.training.global_batch_size % (self.training.micro_batch_size * data):
            raise ValueError(
                f"training.global_batch_size: {self.training.global_batch_size} is not a multiple of micro_batch_size "
                f"{self.training.micro_batch_size} * {data} data-parallel ranks"
            )
        pipeline = parallel.pipeline_model_parallel_size
        micro_batches = self.micro_batches(world_size)
        if self.pipeline_runs > 1 and micro_batches % pipeline:
            raise ValueError(
                f"training.global_batch_size: {self.training.global_batch_size} makes {micro_batches} micro batches a rank; "
                f"num_layers_per_virtual_pipeline_stage needs a multiple of the {pipeline} pipeline ranks"
            )
        stage = world_size // parallel.pipeline_model_parallel_size
        experts, expert_tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size or tensor
        if self.model.num_experts is not None and stage % (experts * expert_tensor):
            raise ValueError(
                f"parallel.expert_model_parallel_size: {experts} * expert_tensor_parallel_size {expert_tensor} does not "
                f"divide the {stage} ranks of a pipeline stage"
            )


def read_content(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """A job file with overrides as it stands, unchecked; arguments and errors as of `Job.read`."""
    content = read_yaml(path)
    for override in overrides:
        _apply(override, content)
    return content


def megatron_version() -> tuple[int, int]:
    """Major and minor version of the installed Megatron-core, without importing it.

    Raises:
        ValueError: it is not installed.
    """
    try:
        major, minor = importlib.metadata.version("megatron-core").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        raise ValueError("megatron-core is not installed; pip install 'mindspeed_nsa[train]' brings it") from None
    return int(major), int(minor)


def _apply(override: str, content: dict[str, Any]) -> None:
    name, separator, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not (separator and dot and section and key):
        raise ValueError(f"{override!r}: expected section.key=value, such as training.seed=1")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: not YAML: {' '.join(str(error).split())}") from None
    if content.get(section) is None:
        content[section] = {}
    if not isinstance(content[section], dict):
        raise ValueError(f"{override!r}: {section} is not a section of the job file")
    content[section][key] = value
