"""The feature in MindSpeed's own manager: how it joins, what it patches, how it leaves, and what it says when it cannot."""

import json

import pytest
from models import ENGINE, GQA, LATENT, LOCAL, MODEL, arguments

ON = ("--experimental-attention-variant", "nsa")
TARGETS = """
import inspect
from torch.distributed.checkpoint.filesystem import _write_item
TARGETS = [
    "megatron.core.transformer.transformer_block._get_block_submodules",
    "megatron.core.transformer.transformer_block.TransformerBlock.sharded_state_dict",
    "megatron.training.training.get_model",
    "megatron.training.training.train_step",
    "megatron.training.training.num_floating_point_operations",
]
if "serialization_format" in inspect.signature(_write_item).parameters:
    TARGETS.append("megatron.core.dist_checkpointing.strategies.filesystem_async._write_item")
from mindspeed.patch_utils import MindSpeedPatchesManager as patches
ours = lambda: {t: [w for w in p.wrappers if "mindspeed_nsa" in w.__module__] for t, p in patches.patches_info.items()}
"""


def passes(run_script, text, *argv):
    code, output = run_script(text, *argv)
    assert code == 0, output[-4000:]
    return output


def fails(run_script, text, said, *argv):
    code, output = run_script(text, *argv)
    assert code != 0
    assert said in output, output[-4000:]


def test_every_target_is_wrapped_once_and_unwrapped(run_script):
    text = (
        "import mindspeed_nsa.megatron_adaptor, mindspeed_nsa.patches.mindspeed as nsa\nimport pkgutil\n"
        + TARGETS
        + """
nsa.join()
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager as manager
assert sum(isinstance(feature, nsa.NSAFeature) for feature in manager.FEATURES_LIST) == 1
assert {target for target, wrappers in ours().items() if wrappers} == set(TARGETS)
assert all(len(ours()[target]) == 1 for target in TARGETS)
for target in TARGETS:
    assert pkgutil.resolve_name(target).__wrapped__ is not None, target
manager.remove_patches()
for target in TARGETS:
    function = pkgutil.resolve_name(target)
    assert "mindspeed" not in function.__code__.co_filename and not hasattr(function, "__wrapped__"), target
"""
    )
    passes(run_script, text, *ON)


def test_without_a_flag_the_patches_are_mindspeed_s_own(run_script):
    listed = """
from mindspeed.patch_utils import MindSpeedPatchesManager as patches
for target, patch in sorted(patches.patches_info.items()):
    print("PATCH", target, getattr(patch.patch_func, "__qualname__", None), [w.__qualname__ for w in patch.wrappers])
"""
    plain, *ours = (
        [line for line in passes(run_script, f"import {adaptor}\n{listed}", *flags).splitlines() if line.startswith("PATCH")]
        for adaptor, flags in (
            ("mindspeed.megatron_adaptor", ()),
            ("mindspeed_nsa.megatron_adaptor", ()),
            ("mindspeed_nsa.megatron_adaptor", (*ON, "--nsa-enabled", "false")),
        )
    )
    assert ours == [plain, plain]
    assert len(plain) > 80


def test_joining_too_late_is_refused(run_script):
    said = "mindspeed.megatron_adaptor was imported before mindspeed_nsa.megatron_adaptor"
    fails(
        run_script, "import mindspeed.megatron_adaptor\nimport mindspeed_nsa.megatron_adaptor", said, "--nsa-config", "nsa.yaml"
    )


def test_a_feature_that_was_not_patched_in_refuses_the_job(run_script):
    text = """
import argparse
from mindspeed_nsa.patches.mindspeed import NSAFeature
NSAFeature().validate_args(argparse.Namespace(experimental_attention_variant="nsa"))
"""
    fails(run_script, text, "was read too late: no patch of NSA is in place")


def test_the_feature_survives_a_list_of_another_host(run_script):
    """A stand-in for MindSpeed-LLM, which overwrites the list before it applies patches; MindSpeed-LLM itself is not tried."""
    text = (
        """
import sys, types, importlib.machinery
host = types.ModuleType("mindspeed_llm")
host.__path__, host.__spec__ = [], importlib.machinery.ModuleSpec("mindspeed_llm", None, is_package=True)
sys.modules["mindspeed_llm"] = host
class Adaptor:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "mindspeed_llm.megatron_adaptor" else None
    def create_module(self, spec): return None
    def exec_module(self, module):
        from mindspeed.features_manager import create_features_list
        from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager
        MindSpeedFeaturesManager.set_features_list(create_features_list())
        import mindspeed.megatron_adaptor
sys.meta_path.insert(0, Adaptor())
import mindspeed_nsa.megatron_adaptor
"""
        + TARGETS
        + "assert {target for target, wrappers in ours().items() if wrappers} == set(TARGETS)"
    )
    passes(run_script, text, *ON)


def test_an_unknown_mindspeed_is_named(run_script):
    text = """
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager as manager
del manager.set_features_list
import mindspeed_nsa.megatron_adaptor
"""
    fails(run_script, text, "MindSpeedFeaturesManager has no set_features_list; NSA is written for MindSpeed master", *ON)


def test_an_unknown_megatron_is_named(run_script):
    text = """
import megatron.core.transformer.transformer_block as block
del block._get_block_submodules
import mindspeed_nsa.megatron_adaptor
"""
    said = "this Megatron-LM has no megatron.core.transformer.transformer_block._get_block_submodules, which NSA wraps"
    fails(run_script, text, said, *ON)


def test_another_plugin_on_the_same_target_stacks(run_script):
    text = """
from mindspeed.features_manager.feature import MindSpeedFeature
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager as manager
class Other(MindSpeedFeature):
    def is_need_apply(self, args): return True
    def register_patches(self, patch_manager, args):
        def train_step(*args): return "other"
        patch_manager.register_patch("megatron.training.training.train_step", train_step)
manager.FEATURES_LIST.append(Other("other"))
import mindspeed_nsa.megatron_adaptor
from megatron.training import training
assert training.train_step.__wrapped__() == "other"
"""
    passes(run_script, text, *ON)


def test_another_plugin_s_attention_is_not_replaced_in_silence(run_script):
    """The other one has put its attention into the layers before NSA comes to them."""
    text = """
import argparse
import mindspeed_nsa.megatron_adaptor
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import transformer_block, transformer_layer
from megatron.core.transformer.attention import SelfAttention
class OtherAttention(SelfAttention): pass
layer = get_gpt_layer_local_spec()
layer.submodules.self_attention.module = OtherAttention
block = transformer_block.TransformerBlockSubmodules(layer_specs=[layer])
transformer_layer.get_transformer_layer_offset = lambda config: 0  # there are no ranks here
transformer_block._get_block_submodules(argparse.Namespace(num_layers=1), block)
"""
    fails(run_script, text, "attention is OtherAttention; NSA replaces SelfAttention or MLASelfAttention", *ON)


@pytest.mark.parametrize("number", [0, 1])
def test_a_layer_with_another_core_is_named(run_script, number):
    text = f"""
import types, torch
import mindspeed_nsa.megatron_adaptor
from mindspeed_nsa.patches import megatron_core
core = torch.nn.Identity()
layer = torch.nn.Module()
layer.self_attention, layer.layer_number = torch.nn.Module(), {number + 1}
layer.self_attention.core_attention = core
megatron_core.check_swapped(torch.nn.ModuleList([layer]), [0, 1])
"""
    fails(run_script, text, f"layer {number} has the attention core Identity, and nsa.layers wants NSA there", *ON)


def test_flags_are_those_of_the_settings(run_script):
    text = """
import argparse
from mindspeed_nsa import NSAConfig
from mindspeed_nsa.patches.mindspeed import NSAFeature, read_settings
parser = argparse.ArgumentParser()
NSAFeature().register_args(parser)
flags = {action.dest for action in parser._actions}
assert {f"nsa_{name}" for name in NSAConfig.model_fields} | {"nsa_config", "nsa_v_head_dim"} == flags - {"help"}
given = "--nsa-layers 1: --nsa-window-size 128 --nsa-separate-kv false --nsa-select-own-block true".split()
args = parser.parse_args(given)
args.experimental_attention_variant = "nsa"
expected = NSAConfig(layers="1:", window_size=128, separate_kv=False, select_own_block=True)
assert read_settings(args) == expected, read_settings(args)
assert read_settings(argparse.Namespace()) is None
"""
    passes(run_script, text)


@pytest.mark.parametrize("latent", [False, True])
def test_flops_are_the_host_s_with_nsa_for_what_it_counts_of_dense_cores(run_script, latent):
    """The host's count is b * s * (A + B * s): what grows with the square is the cores."""
    text = f"""
import argparse
import mindspeed_nsa.megatron_adaptor
from megatron.training import training
from mindspeed_nsa import NSAConfig
from mindspeed_nsa.flops import dense_flops, layer_flops
latent = {latent}
def args(length):
    return argparse.Namespace(
        seq_length=length, hidden_size=256, num_attention_heads=8, num_query_groups=2, kv_channels=48, num_layers=3,
        group_query_attention=not latent, multi_latent_attention=latent, is_hybrid_model=False, num_experts=None,
        mtp_num_layers=None, moe_ffn_hidden_size=None, ffn_hidden_size=512, moe_shared_expert_intermediate_size=None,
        swiglu=True, padded_vocab_size=512, q_lora_rank=None, kv_lora_rank=32, qk_head_dim=32, qk_pos_emb_head_dim=16,
        v_head_dim=40, noop_layers={{2}},
    )
count, host = training.num_floating_point_operations, training.num_floating_point_operations.__wrapped__
length, groups, value = 4096, 8 if latent else 2, 40 if latent else 32
cores = (host(args(2 * length), 1) - 2 * host(args(length), 1)) / 2
assert cores == 3 * 3 * dense_flops(length, 8, 48, 40 if latent else 48), cores
gate = dict(gate="query", separate_kv=False) if latent else {{}}
nsa = layer_flops(NSAConfig(layers="1:", **gate), length, 8, groups, 48, value, 256).total
narrower = 0 if latent else 2 * length * 256 * (8 + 2) * (48 - 32)
expected = host(args(length), 4) + 3 * 4 * (nsa - narrower - cores / 9)  # one layer: the other is noop
assert count(args(length), 4) == expected, (count(args(length), 4), expected)
"""
    flags = ("--nsa-layers", "1:", "--nsa-v-head-dim", "32")
    passes(run_script, text, *ON, *flags, *(("--nsa-gate", "query", "--nsa-separate-kv", "false") if latent else ()))


EXPERTS = {"num-experts": 4, "moe-grouped-gemm": True, "moe-token-dispatcher-type": "alltoall", "expert-model-parallel-size": 2}
EXPERTS["bf16"] = True
REFUSED = [
    ({"context-parallel-size": 2}, "--context-parallel-size 2 does not go with NSA: each rank would attend"),
    ({"attention-dropout": 0.1}, "--attention-dropout 0.1 does not go with NSA: its operators drop nothing"),
    ({"position-embedding-type": "alibi"}, "--position-embedding-type alibi does not go with NSA: its scores take no bias"),
    (
        {"position-embedding-type": "relative"} | ENGINE,
        "--position-embedding-type relative does not go with NSA",
    ),
    ({"mtp-num-layers": 1}, "--mtp-num-layers 1 does not go with NSA: the layers of multi-token prediction would stay dense"),
    ({"use-legacy-models": True, "ckpt-format": "torch"}, "--use-legacy-models True does not go with NSA: legacy models"),
    (
        {"tp-2d": True, "tp-x": 2, "tensor-model-parallel-size": 2},
        "--tp-2d True does not go with NSA: it splits the",
    ),
    (EXPERTS | {"moe-fb-overlap": True}, "--moe-fb-overlap True does not go with NSA: it runs the parts of a layer by itself"),
    ({"nsa-window-size": "wide"}, "nsa.window_size: input should be a valid integer, given 'wide'"),
    ({"nsa-config": "absent.yaml"}, "absent.yaml: no such file or directory"),
    (
        {"experimental-attention-variant": None, "nsa-window-size": 64},
        "--nsa-window-size: NSA is not turned on",
    ),
    (LATENT | {"nsa-gate": "hidden"}, "multi-latent attention hands its core query, key and value only"),
    ({"nsa-backend": "reference"}, "accepted"),
]


@pytest.fixture(scope="module")
def refusals(run_script):
    """What the hosts' own parser and checks, with the feature's, say to each of `REFUSED` in a job that runs without it."""
    job = MODEL | LOCAL | GQA | {"data-path": "text", "use-flash-attn": True, "nsa-backend": "reference"}
    job |= {"experimental-attention-variant": "nsa"}
    text = f"""
import json, os, sys
import mindspeed_nsa.megatron_adaptor
from megatron.training.arguments import parse_args, validate_args
os.environ["WORLD_SIZE"] = "2"
for flags in {[arguments(job | flags) for flags, _ in REFUSED]!r}:
    sys.argv = ["pretrain", *flags]
    try:
        validate_args(parse_args())
        said = "accepted"
    except (AssertionError, ValueError) as error:
        said = str(error)
    print("SAID", json.dumps(said))
"""
    output = passes(run_script, text, *arguments(job))
    return [json.loads(line.removeprefix("SAID ")) for line in output.splitlines() if line.startswith("SAID ")]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda number: REFUSED[number][1][:40])
def test_what_cannot_work_is_refused_in_words(refusals, number):
    assert REFUSED[number][1] in refusals[number]
    assert "\n" not in refusals[number]
