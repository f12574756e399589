import shlex
from pathlib import Path

import pytest
import yaml

from mindspeed_nsa.launch.flags import left_out, megatron_arguments
from mindspeed_nsa.pretrain.job import CheckpointSection, DataSection, Job, LoggingSection, TrainingSection

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny.yaml"
LATENT = ("model.multi_latent_attention=true", "model.num_query_groups=8", "model.kv_channels=")
EXPERTS = ("model.num_experts=8", "model.moe_layer_freq=([0]+[1]*3)", "model.moe_ffn_hidden_size=64", "model.moe_router_topk=3")


def flags(*overrides, config=TINY):
    """The flags as a mapping: `--name` to its value, True for one without."""
    words = megatron_arguments(Job.read(config, overrides), config, list(overrides))
    found = {}
    for word in words:
        if word.startswith("--"):
            assert word not in found, f"{word} is there twice"
            found[word] = True
        else:
            last = list(found)[-1]
            found[last] = word if found[last] is True else f"{found[last]} {word}"
    return found


def test_every_value_is_written_out():
    assert flags() == {
        **{"--num-layers": "4", "--hidden-size": "128", "--ffn-hidden-size": "320", "--num-attention-heads": "8"},
        **{"--group-query-attention": True, "--num-query-groups": "2", "--kv-channels": "16"},
        **{"--seq-length": "1536", "--max-position-embeddings": "1536", "--position-embedding-type": "rope"},
        **{"--rotary-base": "10000", "--rotary-percent": "1.0", "--normalization": "RMSNorm", "--norm-epsilon": "1e-05"},
        **{"--swiglu": True, "--disable-bias-linear": True, "--init-method-std": "0.3"},
        **{"--hidden-dropout": "0.0", "--attention-dropout": "0.0", "--make-vocab-size-divisible-by": "128"},
        **{"--tensor-model-parallel-size": "1", "--pipeline-model-parallel-size": "1", "--context-parallel-size": "1"},
        **{"--expert-model-parallel-size": "1"},
        **{"--train-data-path": "data/python_train", "--num-workers": "0"},
        **{"--tokenizer-type": "NullTokenizer", "--vocab-size": "256"},
        **{"--train-iters": "5", "--micro-batch-size": "1", "--global-batch-size": "2", "--seed": "1234"},
        **{"--lr": "0.0001", "--min-lr": "0.0", "--lr-decay-style": "constant", "--lr-warmup-iters": "0"},
        **{"--lr-decay-iters": "5", "--weight-decay": "0.01", "--clip-grad": "1.0"},
        **{"--adam-beta1": "0.9", "--adam-beta2": "0.999", "--adam-eps": "1e-08"},
        **{"--eval-interval": "100", "--eval-iters": "0"},
        **{"--log-interval": "1", "--tensorboard-dir": "runs/tiny", "--tensorboard-log-interval": "1"},
        **{"--log-throughput": True, "--nsa-config": str(TINY)},
        **{"--accumulate-allreduce-grads-in-fp32": True, "--attention-softmax-in-fp32": True},
        **{
            "--no-create-attention-mask-in-dataloader": True,
            "--no-gradient-accumulation-fusion": True,
            "--no-masked-softmax-fusion": True,
        },
        **{"--override-opt_param-scheduler": True},
    }


@pytest.mark.parametrize(
    ("overrides", "added", "gone"),
    [
        (["model.add_bias_linear=true"], {}, ["--disable-bias-linear"]),
        (["training.bf16=true", "model.qk_layernorm=true"], {"--bf16": True, "--qk-layernorm": True}, []),
        (["model.num_query_groups="], {"--num-query-groups": "8"}, []),
        (["model.v_head_dim=8"], {"--nsa-v-head-dim": "8"}, ["--v-head-dim"]),
        (["model.v_head_dim=8", "nsa.enabled=false"], {}, ["--v-head-dim", "--nsa-v-head-dim"]),
        (["nsa.layers='-2:'"], {"--nsa-layers": "'-2:'"}, []),
        (["parallel.tensor_model_parallel_size=4"], {"--make-vocab-size-divisible-by": "32"}, []),
        (["training.lr_decay_iters=9"], {"--lr-decay-iters": "9"}, []),
        (["logging.tensorboard=false"], {}, ["--tensorboard-dir"]),
        (["data.valid_data_path=v", "training.eval_iters=2"], {"--valid-data-path": "v", "--eval-iters": "2"}, []),
        (
            ["data.tokenizer_type=HuggingFaceTokenizer", "data.tokenizer_model=a/b/tokenizer.json"],
            {"--tokenizer-type": "HuggingFaceTokenizer", "--tokenizer-model": "a/b"},
            ["--vocab-size"],
        ),
        (
            ["checkpoint.save=c"],
            {"--save": "c", "--save-interval": "5", "--exit-signal-handler": True},
            ["--load"],
        ),
        (["checkpoint.load=c"], {"--load": "c", "--exit-on-missing-checkpoint": True}, ["--ckpt-step", "--save"]),
        (["checkpoint.load=c/iter_0000020"], {"--load": "c", "--ckpt-step": "20"}, []),
        (
            ["nsa.window_size=256", "nsa.layers=[1, 3]"],
            {"--nsa-config": str(TINY), "--nsa-window-size": "256", "--nsa-layers": "[1, 3]"},
            [],
        ),
        (["nsa.enabled=false", "nsa.window_size=256"], {}, ["--nsa-config", "--nsa-window-size", "--nsa-enabled"]),
        (
            [*LATENT, "model.q_lora_rank=32"],
            {
                **{"--multi-latent-attention": True, "--q-lora-rank": "32", "--kv-lora-rank": "512", "--qk-head-dim": "128"},
                **{
                    "--qk-pos-emb-head-dim": "64",
                    "--v-head-dim": "128",
                    "--kv-channels": "192",
                    "--rotary-scaling-factor": "1.0",
                },
            },
            ["--group-query-attention", "--num-query-groups"],
        ),
        (
            [*EXPERTS, "parallel.expert_tensor_parallel_size=1"],
            {
                **{"--num-experts": "8", "--moe-layer-freq": "([0]+[1]*3)", "--moe-ffn-hidden-size": "64"},
                **{"--moe-router-topk": "3", "--expert-tensor-parallel-size": "1"},
            },
            [],
        ),
        (["megatron.use-flash-attn=true"], {"--use-flash-attn": True}, []),
        (["megatron.profile_ranks=[0, 1]"], {"--profile-ranks": "0 1"}, []),
    ],
)
def test_what_a_key_changes(overrides, added, gone):
    found = flags(*overrides)
    assert {name: found.get(name) for name in added} == added
    assert not set(gone) & set(found)


def test_no_key_of_a_section_is_lost():
    """A key that is added to a section reaches Megatron, or is named here."""
    elsewhere = {"--data-path", "--run-dir", "--tensorboard", "--sample-tokens", "--load", "--save", "--save-interval"}
    given = ["training.bf16=true", "data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true"]
    given += ["data.valid_data_path=v", "data.tokenizer_type=HuggingFaceTokenizer", "data.tokenizer_model=a/t.json"]
    found = flags(*given, "data.data_cache_path=c")
    for section in (DataSection, TrainingSection, CheckpointSection, LoggingSection):
        names = {"--" + name.replace("_", "-") for name in section.model_fields} - elsewhere
        assert names <= set(found), names - set(found)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("megatron.num_layers=3", "megatron.num_layers: follows from the other sections of the job file; change it there"),
        ("megatron.train-data-path=x", "megatron.train_data_path: follows from the other sections"),
        ("megatron.q_lora_rank=3", "megatron.q_lora_rank: follows from the other sections"),
        ("megatron.yaml_cfg=x", "megatron.yaml_cfg: not allowed here"),
        ("megatron.nsa_layers=all", "megatron.nsa_layers: not allowed here"),
        ("megatron.use_flash_attn=false", "megatron.use_flash_attn: False; allowed: true for an option without value"),
        ("megatron.moe_grouped_gemm=", "megatron.moe_grouped_gemm: None; allowed"),
    ],
)
def test_what_megatron_may_not_hold(override, message):
    with pytest.raises(ValueError) as caught:
        flags(override)
    assert str(caught.value).startswith(message)


def test_what_megatron_has_nothing_for_is_named():
    assert left_out(Job.read(TINY)) == []
    assert left_out(Job.read(ROOT / "configs" / "quickstart.yaml")) == ["logging.sample_tokens"]


def test_the_words_are_a_command_line(tmp_path):
    content = yaml.safe_load(TINY.read_text())
    content["data"]["data_path"] = "a folder/text"
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(content))
    words = megatron_arguments(Job.read(tmp_path / "job.yaml"), tmp_path / "job.yaml", [])
    assert shlex.split(shlex.join(words)) == words
    assert words[words.index("--train-data-path") + 1] == "a folder/text"
