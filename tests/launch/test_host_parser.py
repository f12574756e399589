"""The flags as Megatron-LM, MindSpeed and the feature read them: the values of the file, and the model of the trainer here."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import hosts_needed
import pytest
import torch
from emulated_cann import build
from shipped import CONFIGS, DIES, LAYOUTS, ROOT

from mindspeed_nsa.launch.flags import megatron_arguments
from mindspeed_nsa.pretrain.job import Job

pytest.importorskip("megatron.core")

from mindspeed_nsa.patches import cpu_host

pytestmark = hosts_needed.marks

TINY = ROOT / "configs" / "tiny.yaml"
HALF = "training.bf16=true"  # as the chip needs it
LATENT = ("model.multi_latent_attention=true", "model.num_query_groups=8", "model.kv_channels=", "model.q_lora_rank=32")
QUERY = ("nsa.gate=query", "nsa.separate_kv=false")
CASES = {
    **{path.stem: (path, [] if "bf16: true" in path.read_text() else [HALF], DIES) for path in CONFIGS},
    **{f"{path.stem}-{nodes}x{length}k": (path, more, nodes * DIES) for path, nodes, length, more, _ in LAYOUTS},
    "latent": (TINY, [HALF, *LATENT, *QUERY], 2),
    "values": (TINY, [HALF, "model.v_head_dim=8", "model.add_qkv_bias=true", "parallel.tensor_model_parallel_size=2"], 2),
    "stages": (
        TINY,
        [HALF, "parallel.pipeline_model_parallel_size=2", "training.global_batch_size=8", "training.lr_warmup_iters=2"],
        4,
    ),
    "packed": (TINY, [HALF, "data.reset_attention_mask=true", "data.reset_position_ids=true", "data.eod_mask_loss=true"], 2),
    "resumed": (TINY, [HALF, "checkpoint.save=saved", "checkpoint.load=saved/iter_0000003", "checkpoint.save_interval=2"], 2),
}
# What may differ from the trainer here: speed, and the first weights, which Megatron draws in another way.
FREE = {
    *("use_cpu_initialization", "deallocate_pipeline_outputs", "cpu_offloading_weights", "persist_layer_norm"),
    *("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion", "cuda_graph_scope", "cp_comm_type"),
    *("init_method", "output_layer_init_method", "embedding_init_method"),
    # Megatron-LM has no flag for plain rotary positions in MLA: YaRN with a factor of 1 is the same, see below.
    *("rope_type", "mscale_all_dim"),
}


@pytest.fixture(scope="module")
def read():
    """What the parser made of each case; one process for each way to set NSA, which a job has once."""
    groups: dict[str, list[str]] = {}
    for name, (path, overrides, _) in CASES.items():
        nsa = Job.read(path, overrides).nsa
        groups.setdefault(nsa.gate, []).append(name)
    found = {}
    for names in groups.values():
        found |= dict(zip(names, ask(names), strict=True))
    return found


def ask(names):
    requests = []
    for name in names:
        path, overrides, ranks = CASES[name]
        requests.append({"flags": megatron_arguments(Job.read(path, overrides), path, overrides), "ranks": ranks})
    environment = os.environ | build.environment(build.torch_npu_path()) | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("host_parser.py"))],
        input="\n".join(map(json.dumps, requests)),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(job):
    """The values of a file by the names that Megatron's parser has for them."""
    model, data = job.model, job.data
    values = dict(model) | dict(job.parallel) | dict(data) | dict(job.training)
    values |= {"ffn_hidden_size": model.ffn_width, "kv_channels": model.head_width}
    values |= {"max_position_embeddings": model.max_position_embeddings or model.seq_length}
    values |= {"lr_decay_iters": job.training.decay_iters, "attention_softmax_in_fp32": True, "fp16": False}
    values |= {"train_data_path": [values.pop("data_path")], "valid_data_path": data.valid_data_path and [data.valid_data_path]}
    values |= {
        "expert_tensor_parallel_size": job.parallel.expert_tensor_parallel_size or job.parallel.tensor_model_parallel_size
    }
    del values["cp_comm_type"]  # of context parallelism, which is refused there
    values["moe_layer_freq"] = 1 if model.moe_layer_freq == 1 else [int(is_moe) for is_moe in model.expert_layers]
    values["moe_ffn_hidden_size"] = model.moe_ffn_hidden_size or model.ffn_width
    values |= {"group_query_attention": not model.multi_latent_attention, "create_attention_mask_in_dataloader": False}
    if model.multi_latent_attention:
        values |= {"v_head_dim": model.value_width, "num_query_groups": 1}
    else:
        values |= {"num_query_groups": model.query_groups, "nsa_v_head_dim": values.pop("v_head_dim")}
        for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim"):
            del values[name]
    if data.tokenizer_type == "ByteTokenizer":
        values |= {"tokenizer_type": "NullTokenizer", "vocab_size": 256}
    else:
        values["tokenizer_model"] = str(Path(data.tokenizer_model).parent)
    return values | job.megatron


@pytest.mark.parametrize("name", CASES)
def test_the_arguments_have_the_values_of_the_file(read, name):
    path, overrides, ranks = CASES[name]
    job, args = Job.read(path, overrides), read[name]["args"]
    wanted = expected(job) | {"world_size": ranks}
    assert {key: args[key] for key in wanted} == wanted
    assert read[name]["nsa"] == job.nsa.model_dump()


@pytest.mark.parametrize("name", [name for name, (path, *_) in CASES.items() if "num_experts" not in path.read_text()])
def test_the_model_is_that_of_the_trainer_here(read, name):
    from mindspeed_nsa.pretrain.model import padded_vocabulary, transformer_config

    path, overrides, _ = CASES[name]
    job = Job.read(path, overrides)
    ours, theirs = transformer_config(job), read[name]["config"]
    shared = {field.name for field in dataclasses.fields(ours)} & set(theirs) - FREE
    shared -= {name for name in shared if name.startswith("moe_")} | {"activation_func"}
    assert {key: theirs[key] for key in shared} == {key: str(getattr(ours, key)) for key in shared}
    assert theirs["activation_func"].startswith(f"<function {ours.activation_func.__name__} ")
    assert read[name]["vocabulary"] == padded_vocabulary(257, job.parallel.tensor_model_parallel_size)


@pytest.fixture
def on_cpu():
    cpu_host.install()
    yield
    cpu_host.uninstall()


def test_yarn_with_a_factor_of_1_is_plain_rotary_positions(read, on_cpu):
    from megatron.core.models.common.embeddings import RotaryEmbedding, YarnRotaryEmbedding

    assert read["latent"]["config"]["rotary_scaling_factor"] == "1.0"
    how = {"rotary_percent": 1.0, "rotary_base": 10000, "use_cpu_initialization": True}
    yarn = YarnRotaryEmbedding(64, scaling_factor=1.0, mscale=1.0, mscale_all_dim=1.0, **how)
    positions, scale = yarn.forward(8192)
    assert scale == 1.0
    # Angles in float32, up to 8192.
    torch.testing.assert_close(positions, RotaryEmbedding(64, **how).forward(8192), rtol=1e-6, atol=2e-5)


def test_a_checkpoint_to_go_on_from(read):
    args = read["resumed"]["args"]
    expected = {"save": "saved", "load": "saved", "ckpt_step": 3, "save_interval": 2, "exit_on_missing_checkpoint": True}
    assert {key: args[key] for key in expected} == expected
    assert args["exit_signal_handler"] and args["override_opt_param_scheduler"]
