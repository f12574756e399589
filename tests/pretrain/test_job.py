from pathlib import Path

import pytest

from mindspeed_nsa.pretrain import job as module
from mindspeed_nsa.pretrain.job import Job, megatron_version

pytest.importorskip("megatron.core")

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


@pytest.fixture
def read(text, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return lambda *overrides: Job.from_file(TINY, [f"data.data_path={text}_train", *overrides])


def test_reads_the_file_and_its_overrides(read):
    job = read("training.lr=1e-3", "model.swiglu=false", "nsa.layers=[1, 3]", "checkpoint.load=", "training.seed=7")
    assert (job.training.lr, job.model.swiglu, job.nsa.layers, job.checkpoint.load) == (1e-3, False, [1, 3], None)
    assert (job.model.num_layers, job.training.seed, job.parallel.tensor_model_parallel_size) == (4, 7, 1)


def test_defaults_follow_from_other_keys(read):
    job = read("model.num_query_groups=", "model.kv_channels=", "training.train_iters=9")
    assert (job.model.query_groups, job.model.head_width, job.training.decay_iters) == (8, 16, 9)
    latent = read("model.multi_latent_attention=true", "model.num_query_groups=8")
    assert latent.model.head_width == 128 + 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.num_lyers=3", "model.num_lyers: unknown key; did you mean num_layers?"),
        ("nsa.window=3", "nsa.window: unknown key; did you mean window_size?"),
        ("modle.num_layers=3", "modle: unknown key; did you mean model?"),
        ("model.num_layers=three", "model.num_layers: input should be a valid integer, given 'three'"),
        ("model.num_layers=true", "model.num_layers: input should be a valid integer, given True"),
        ("training.lr=0", "training.lr: input should be greater than 0, given 0"),
        ("model.num_attention_heads=9", "model.num_query_groups: 2 does not divide num_attention_heads 9"),
        ("model.kv_channels= model.hidden_size=100", "model.hidden_size: 100 does not divide by num_attention_heads 8"),
        ("model.max_position_embeddings=9", "model.max_position_embeddings: 9 is less than seq_length 1536"),
        ("model.attention_dropout=0.1", "model.attention_dropout: input should be less than or equal to 0, given 0.1"),
        ("model.q_lora_rank=64", "model.q_lora_rank: only multi_latent_attention reads it, which is false"),
        ("model.multi_latent_attention=true", "model.num_query_groups: 2 with multi_latent_attention"),
        (
            "parallel.context_parallel_size=2",
            "parallel.cp_comm_type: None with context_parallel_size 2; context parallelism needs a2a",
        ),
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel: needs tensor_model_parallel_size of 2"),
        ("parallel.recompute_granularity=some", "parallel.recompute_granularity: input should be 'full' or 'selective'"),
        ("parallel.recompute_granularity=full", "parallel.recompute_granularity: full needs recompute_method and"),
        ("parallel.tensor_model_parallel_size=3", "parallel.tensor_model_parallel_size: 3 does not divide num_attention"),
        ("parallel.pipeline_model_parallel_size=3", "model.num_layers: 4 does not divide by pipeline_model_parallel_size"),
        ("parallel.tensor_model_parallel_size=2", "does not divide the 1 ranks that were started"),
        ("training.micro_batch_size=4", "training.global_batch_size: 2 is not a multiple of micro_batch_size 4 * 1"),
        ("training.min_lr=1", "training.min_lr: 1.0 is more than lr"),
        ("training.lr_warmup_iters=5", "training.lr_warmup_iters: 5 is not less than the 5 iterations of decay"),
        ("training.eval_iters=1", "data.valid_data_path: evaluation needs one; training.eval_iters: 0 does without"),
        ("data.reset_attention_mask=true", "data.reset_attention_mask: goes with reset_position_ids"),
        ("data.valid_data_path=absent", "data.valid_data_path: absent.bin: no such file; `mindspeed-nsa prepare`"),
        ("data.tokenizer_type=HuggingFaceTokenizer", "data.tokenizer_model: None: no such file"),
        ("checkpoint.save_interval=2", "checkpoint.save_interval: needs a folder in save"),
        ("nsa.layers=[4]", "nsa.layers: [4] goes past num_layers 4, counted from 0"),
        ("model.moe_router_topk=2", "model.moe_router_topk: only a Mixture of Experts reads it; num_experts is not set"),
        ("model.num_experts=4 model.moe_router_topk=5", "model.moe_router_topk: 5 is more than num_experts 4"),
        ("model.num_experts=4 model.moe_layer_freq=2", "model.moe_layer_freq: 2 is neither 1 nor a pattern"),
        ("model.num_experts=4 model.moe_layer_freq=all", "model.moe_layer_freq: 'all' is neither 1 nor a pattern such as"),
        ("model.num_experts=4 model.moe_layer_freq=([0]+[1]*2)", "moe_layer_freq: ([0]+[1]*2) is of 3 layers"),
        ("model.num_experts=4 parallel.expert_model_parallel_size=3", "expert_model_parallel_size: 3 does not divide num_ex"),
        ("parallel.expert_model_parallel_size=2", "parallel.expert_model_parallel_size: it and expert_tensor_parallel_size"),
        ("parallel.expert_tensor_parallel_size=1", "parallel.expert_model_parallel_size: it and expert_tensor_parallel_size"),
        (
            "parallel.context_parallel_size=2 parallel.cp_comm_type=all_gather model.seq_length=1538",
            "model.seq_length: 1538 is not a multiple of 4: two pieces a context-parallel rank",
        ),
        (
            "parallel.context_parallel_size=2 parallel.cp_comm_type=a2a nsa.layers=1::2",
            "parallel.context_parallel_size: 2; dense layers need whole sequences",
        ),
        (
            "parallel.context_parallel_size=16 parallel.cp_comm_type=a2a",
            "num_attention_heads 8 is not a multiple of context_parallel_size 16; all_gather takes any",
        ),
        (
            "parallel.num_layers_per_virtual_pipeline_stage=1",
            "parallel.num_layers_per_virtual_pipeline_stage: 1 does not part the layers",
        ),
        ("nsa.select_block_size=32", "nsa.select_block_size: 32 cannot run on the Ascend operators"),
    ],
)
def test_what_cannot_work_is_one_line_that_names_the_file_and_the_key(read, overrides, message):
    with pytest.raises(ValueError) as caught:
        read(*overrides.split(" "))
    assert str(caught.value).startswith(f"{TINY}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["training.seed", "seed=1", ".seed=1", "training.=1"])
def test_an_override_has_a_section_a_key_and_a_value(read, override):
    with pytest.raises(ValueError, match=r"expected section\.key=value"):
        read(override)


def test_packed_documents_take_one_sequence_at_a_time(read):
    packed = ("data.reset_attention_mask=true", "data.reset_position_ids=true")
    assert read(*packed).data.reset_attention_mask
    with pytest.raises(ValueError, match=r"training\.micro_batch_size: 2; reset_attention_mask packs documents"):
        read(*packed, "training.micro_batch_size=2")


def test_layers_with_experts():
    model = Job.read(TINY, ["model.num_experts=4", "model.moe_layer_freq=([0]*1+[1]*2+[0])"]).model
    assert model.expert_layers == [False, True, True, False]
    assert Job.read(TINY, ["model.num_experts=4"]).model.expert_layers == [True] * 4
    assert Job.read(TINY).model.expert_layers == [False] * 4


def test_experts_are_split_within_a_pipeline_stage():
    experts = ("model.num_experts=4", "parallel.expert_model_parallel_size=4", "training.global_batch_size=8")
    job = Job.read(TINY, [*experts, "parallel.tensor_model_parallel_size=2"])
    with pytest.raises(ValueError, match=r"4 \* expert_tensor_parallel_size 2 does not divide the 4 ranks of a pipeline stage"):
        job.check_layout(4, (0, 12))
    job.check_layout(8, (0, 12))
    Job.read(TINY, [*experts, "parallel.expert_tensor_parallel_size=1"]).check_layout(4, (0, 12))


def test_widths_that_follow_from_others():
    model = Job.read(TINY).model
    assert (model.ffn_width, model.value_width) == (320, 16), "8/3 of 128 in whole 64s"
    plain = Job.read(TINY, ["model.swiglu=false", "model.v_head_dim=8"]).model
    assert (plain.ffn_width, plain.value_width) == (512, 8)


def test_a_missing_file_and_a_file_that_is_no_job(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.yaml: no such file"):
        Job.from_file(tmp_path / "absent.yaml")
    (tmp_path / "empty.yaml").write_text("nsa: {}\n")
    with pytest.raises(ValueError, match=r"empty\.yaml: model: field required"):
        Job.from_file(tmp_path / "empty.yaml")


def test_ranks_are_counted_from_the_launch(read, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    layout = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
    assert read(*layout, "training.global_batch_size=1")
    with pytest.raises(ValueError, match=r"micro_batch_size 1 \* 2 data-parallel ranks"):
        read(layout[0], "training.global_batch_size=3")


def test_groups_are_split_over_ranks_from_megatron_0_16_on(read, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    split = "parallel.tensor_model_parallel_size=4"
    monkeypatch.setattr(module, "megatron_version", lambda: (0, 12))
    with pytest.raises(ValueError, match=r"4 is more than num_query_groups 2, .* from 0\.16 on; here is 0\.12"):
        read(split)
    monkeypatch.setattr(module, "megatron_version", lambda: (0, 16))
    assert read(split)


def test_megatron_version_is_that_of_the_installed_one():
    import megatron.core

    assert ".".join(map(str, megatron_version())) == ".".join(megatron.core.__version__.split(".")[:2])
