import json
import os
import shutil

import pytest
import torch
from jobs import ROOT, SMALL, arguments

pytest.importorskip("megatron.core")
pytest.importorskip("transformers")

import transformers
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from safetensors.torch import load_file, save_file

from mindspeed_nsa import cli
from mindspeed_nsa.patches import cpu_host
from mindspeed_nsa.pretrain import checkpoint
from mindspeed_nsa.pretrain.convert import convert
from mindspeed_nsa.pretrain.job import Job
from mindspeed_nsa.pretrain.model import build_models
from mindspeed_nsa.pretrain.trainer import ranks

VOCABULARY, PADDED = 300, 384
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
BASE = ("model.rotary_base=5000",)
MODELS = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}, ()),
    "untied": (transformers.LlamaConfig, {}, ("model.untie_embeddings_and_output_weights=true",)),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}, ("model.add_qkv_bias=true",)),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": True}, ("model.qk_layernorm=true",)),
}


@pytest.fixture(scope="module", autouse=True)
def host():
    """What `ranks` puts in place stays until the tests of this module are done."""
    yield
    cpu_host.uninstall()


def job_of(*overrides: str) -> Job:
    return Job.read(ROOT / "configs" / "tiny.yaml", [*SMALL, *overrides])


@pytest.fixture(scope="module", params=MODELS)
def pretrained(request, tmp_path_factory):
    """A model of transformers, its folder, and what a job says to be of the same model."""
    kind, settings, overrides = MODELS[request.param]
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(kind(**SIZES, **settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model*.safetensors"))) > 1
    return model, folder, (*BASE, *overrides)


@pytest.fixture
def llama(tmp_path):
    """The folder of a tied Llama in one file, and the overrides of its job."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama", BASE


def loaded(job: Job, folder):
    model_parallel_cuda_manual_seed(job.training.seed)
    model = build_models(job, PADDED)[0]
    checkpoint.load_weights([model], checkpoint.find(str(folder)))
    return model.eval()


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, torch.arange(tokens.shape[1])[None], None)


def open_gates_to(model, branch: int) -> None:
    for name, parameter in model.named_parameters():
        if "linear_gate" in name:
            parameter.data.zero_()
        if name.endswith("linear_gate.bias"):
            parameter.data.view(-1, 3).fill_(-40)[:, branch] = 40


def test_a_dense_job_gives_the_logits_of_transformers(pretrained, tmp_path):
    model, folder, overrides = pretrained
    job = job_of(*overrides)
    convert(job, folder, tmp_path)
    tokens = torch.randint(257, (1, 100))
    with torch.no_grad():
        expected = model(tokens).logits
    with ranks(job):
        found = logits(loaded(job, tmp_path), tokens)
    assert expected.std() > 0.5
    torch.testing.assert_close(found[..., :VOCABULARY], expected, atol=1e-4, rtol=1e-4)
    assert found.shape[-1] == PADDED and not found[..., VOCABULARY:].any()


@pytest.mark.parametrize("branch", [1, 2], ids=["select", "window"])
def test_one_branch_of_an_nsa_job_is_the_dense_model_on_a_short_text(pretrained, tmp_path, branch):
    model, folder, overrides = pretrained
    job = job_of(*overrides, "nsa.enabled=true")
    convert(job, folder, tmp_path)
    tokens = torch.randint(257, (1, 256))
    with torch.no_grad():
        expected = model(tokens).logits
    with ranks(job):
        nsa = loaded(job, tmp_path)
        open_gates_to(nsa, branch)
        found = logits(nsa, tokens)
    torch.testing.assert_close(found[..., :VOCABULARY], expected, atol=1e-4, rtol=1e-4)


def test_each_group_has_copies_of_its_key_and_value_for_two_branches(llama, tmp_path):
    folder, overrides = llama
    job = job_of(*overrides, "nsa.enabled=true")
    convert(job, folder, tmp_path)
    stored = load_file(folder / "model.safetensors")
    key, value = (stored[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "kv")
    with ranks(job):
        attention = loaded(job, tmp_path).decoder.layers[1].self_attention
    branches = attention.linear_branch_kv.weight
    rows = [part[8 * group : 8 * group + 8] for group in range(2) for part in (key, value, key, value)]
    assert torch.equal(branches, torch.cat(rows))


@pytest.fixture(scope="module")
def dense(run_job, tmp_path_factory):
    """A dense run's folder of checkpoints."""
    folder = tmp_path_factory.mktemp("dense")
    run_job(f"checkpoint.save={folder}")
    return folder


@pytest.fixture(scope="module")
def converted(dense, text, tmp_path_factory):
    """A checkpoint that the command made of it for an NSA job."""
    folder = tmp_path_factory.mktemp("converted") / "nsa"
    with pytest.raises(SystemExit) as done:
        cli.main(["convert", *arguments(text, folder, ("nsa.enabled=true",)), "--load", str(dense), "--save", str(folder)])
    assert not done.value.code
    return folder


def test_it_says_what_was_copied_what_is_new_and_what_was_dropped(dense, tmp_path):
    lines = convert(job_of("nsa.enabled=true"), dense, tmp_path / "nsa")
    # Two layers of 6 weights, the embedding and the last norm: 64 * (384 + 2 * (96 + 64 + 256 + 128 + 2) + 1).
    assert lines == [
        "copied: 14 parameters with 94,528 values",
        "copied again, keys and values of linear_qkv: 2 x linear_branch_kv.weight",
        "new, drawn with seed 1234: 2 x core_attention.attention.compress_key.weight, "
        "2 x core_attention.attention.compress_value.weight, "
        "2 x core_attention.attention.compress_value.position, "
        "2 x linear_gate.weight, 2 x linear_gate.bias",
        "dropped: optimizer, schedule and random states",
        f"saved {tmp_path / 'nsa' / 'iter_0000000'}; checkpoint.load={tmp_path / 'nsa'} starts from it",
    ]


def test_any_layout_starts_from_it(run_job, converted, tmp_path):
    load = ("nsa.enabled=true", f"checkpoint.load={converted}", "training.train_iters=2")
    alone = run_job(*load, f"checkpoint.save={tmp_path}")
    assert "weights alone, as converted: optimizer, schedule and data start anew" in alone.stdout
    assert alone.values("iteration") == [1, 2]
    settings = ("parallel.tensor_model_parallel_size=2", "parallel.use_distributed_optimizer=true")
    split = run_job(*load, *settings, ranks=2)
    assert split.values("loss") == pytest.approx(alone.values("loss"), abs=5e-5)
    # What starts from the weights saves its whole state, and goes on from that.
    resumed = run_job("nsa.enabled=true", f"checkpoint.load={tmp_path}", "training.train_iters=3")
    assert resumed.values("iteration") == [3] and "weights alone" not in resumed.stdout


def test_the_master_weights_of_a_bf16_job_are_those_that_were_loaded(run_job, converted):
    load = ("nsa.enabled=true", f"checkpoint.load={converted}", "training.train_iters=2")
    exact = run_job(*load)
    rounded = run_job(*load, "training.bf16=true")
    # The second loss comes from weights that the optimizer has written back: from stale ones it is 0.5 off.
    assert rounded.values("loss") == pytest.approx(exact.values("loss"), abs=0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.num_query_groups=4",), "it has num_key_value_heads 2, the job model.num_query_groups: 4"),
        (("model.rotary_base=10000",), "it has rope_theta 5000.0, the job model.rotary_base: 10000"),
        (("model.add_qkv_bias=true",), "it has q_proj.bias: False, the job model.add_qkv_bias: True"),
        (("model.v_head_dim=4", "nsa.enabled=true"), "it has values as wide as keys, 8, the job model.v_head_dim: 4"),
        (("model.norm_epsilon=1e-6",), "it has rms_norm_eps 1e-05, the job model.norm_epsilon: 1e-06"),
        (
            ("model.untie_embeddings_and_output_weights=true",),
            "it has an output layer of its own: False, the job model.untie_embeddings_and_output_weights: True",
        ),
    ],
)
def test_a_model_that_is_not_the_jobs_is_refused(llama, tmp_path, overrides, message):
    folder, base = llama
    with pytest.raises(ValueError) as error:
        convert(job_of(*base, *overrides), folder, tmp_path / "out")
    assert str(error.value) == f"{folder} is of another model: {message}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is none of llama, qwen2, qwen3"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type 'llama3'; a job has plain RoPE"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'; a job has plain RoPE"),
        ({"use_sliding_window": True}, "use_sliding_window true"),
        ({"vocab_size": 200}, "config.json has vocab_size 200, the job's ByteTokenizer 257 tokens"),
    ],
)
def test_a_config_that_no_job_can_have_is_refused(llama, tmp_path, config, message):
    folder, base = llama
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError) as error:
        convert(job_of(*base), folder, tmp_path / "out")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_that_do_not_fit_are_named_and_nothing_is_written(llama, tmp_path):
    folder, base = llama
    path = folder / "model.safetensors"
    whole = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    without = {key: value for key, value in whole.items() if key != name}
    for weights, message in (
        (without, f"it lacks {name}"),
        (whole | {"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}, "it has model.layers.0.self_attn.o_proj.bias"),
        (whole | {name: torch.ones(100, 64)}, f"model.layers.1.mlp.gate_proj.weight, {name}: [228, 64], not [256, 64]"),
    ):
        save_file(weights, path)
        with pytest.raises(ValueError) as error:
            convert(job_of(*base), folder, tmp_path / "out")
        assert message in str(error.value)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.safetensors: "):
        convert(job_of(*base), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_longer_vocabulary_is_cut_and_said(llama, tmp_path):
    folder, base = llama
    path, config = folder / "model.safetensors", folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 400}))
    weights = load_file(path)
    embedding = torch.randn(400, 64)
    save_file(
        weights | {"model.embed_tokens.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, path
    )
    lines = convert(job_of(*base), folder, tmp_path / "out")
    assert "dropped: model.layers.0.self_attn.rotary_emb.inv_freq" in lines
    assert "dropped: rows 384 to 399 of the vocabulary, which the job's tokenizer does not use" in lines
    with ranks(job_of(*base)):
        model = loaded(job_of(*base), tmp_path / "out")
    assert torch.equal(model.embedding.word_embeddings.weight, embedding[:PADDED])


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(dense, converted, tmp_path):
    for overrides, load, message in (
        (("model.hidden_size=32", "nsa.enabled=true"), dense, "it has model.hidden_size 64, not 32"),
        (("nsa.enabled=true",), converted, "is of an NSA job already"),
        (("nsa.enabled=true",), tmp_path, "no checkpoint there"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(job_of(*overrides), load, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="holds checkpoints; name another folder"):
        convert(job_of("nsa.enabled=true"), dense, converted)


def test_an_unfinished_checkpoint_is_none(dense, tmp_path, monkeypatch):
    """Stopped before the last rename: the next conversion starts over."""

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint.os, "replace", stop)
        convert(job_of("nsa.enabled=true"), dense, tmp_path)
    with pytest.raises(ValueError, match="no checkpoint there"):
        checkpoint.find(str(tmp_path))
    convert(job_of("nsa.enabled=true"), dense, tmp_path)
    assert checkpoint.find(str(tmp_path)).name == "iter_0000000"
    shutil.rmtree(tmp_path)
