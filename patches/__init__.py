"""Everything that meets a host: one module a host, and one for what they share. Nothing here acts on import.

The catalogue: what each patch changes, why, how, and when it can go.

cpu_host: Megatron-core on a host with no accelerator; `install` puts all of it in place and `uninstall` takes it away.
    torch.cuda.current_device, torch.cuda.synchronize
        why:  Megatron asks for the device, and waits for it, wherever it allocates or communicates.
        how:  the device is the CPU, and nothing is waited for.
        when: Megatron asks `torch.accelerator`.
    torch.cuda.get_rng_state, set_rng_state, manual_seed, random.get_rng_state; tensor_parallel.random._set_cuda_rng_state
        why:  dropout and recompute keep states of the device's generator.
        how:  the CPU's generator; the warning that it moved within a fork is filtered, because there it should.
        when: as above.
    CPUDeviceMode, a TorchFunctionMode
        why:  tensors are made with device="cuda" or pinned, and optimizers tell them by names such as
              torch.cuda.FloatTensor.
        how:  the device becomes the CPU; `Tensor.type()` asked by Megatron says torch.cuda.
        when: as above.

mindspeed: a MindSpeed job with NSA; MindSpeed's manager applies these with its own, and removes them.
    MindSpeedFeaturesManager.set_features_list
        why:  MindSpeed-LLM puts a list of its own in the place of the one that the feature has joined.
        how:  the feature is added to every list.
        when: MindSpeed finds features by an entry point.
    megatron.core.transformer.transformer_block._get_block_submodules
        why:  every layer spec of a decoder comes through it, whoever wrote it, before a layer is built.
        how:  wrapped: the layers that `nsa.layers` names get NSA's attention; the others stay as specified.
        when: the host asks a registry for attention variants.
    megatron.core.transformer.transformer_block.TransformerBlock.sharded_state_dict
        why:  Megatron stacks the parameters of all layers under one name, which layers that differ do not have in common.
        how:  wrapped: where some layers are dense, `non_homogeneous_layers` is set, and each layer has names of its own.
        when: Megatron looks at the layers.
    megatron.training.training.get_model
        why:  operators are probed once ranks can talk, and a model whose cores are not those asked for must not train.
        how:  wrapped: `agree_on_plan` before, `check_swapped` after.
        when: the host has hooks around building a model.
    megatron.training.training.train_step
        why:  what the layers choose belongs in the job's TensorBoard.
        how:  wrapped: at the log interval, statistics are collected during the step and written after it.
        when: the host lets modules write scalars.
    megatron.training.training.num_floating_point_operations
        why:  the throughput that the host prints counts dense attention.
        how:  wrapped: the dense attention of NSA layers is taken out, theirs put in (`mindspeed_nsa.flops`).
        when: the host asks layers for their operations.
    megatron.core.dist_checkpointing.strategies.filesystem_async._write_item
        why:  Megatron-LM core_v0.12.1 calls it as torch 2.6 had it, and cannot save `torch_dist` on torch 2.13.
        how:  wrapped as in without_te, and only where torch asks for a format.
        when: MindSpeed pairs with Megatron-core 0.14.

npu_host: Megatron-core on a host with NPUs; `install` puts all of it in place before Megatron is imported, for good.
    torch_npu.contrib.transfer_to_npu, a module of torch_npu that acts when it is imported
        why:  Megatron calls torch.cuda and asks for device="cuda" and for nccl.
        how:  all of these become the NPU's; it says so in a screenful of warnings, which are dropped. It also lets
              torch.jit.script return functions as they are.
        when: Megatron asks `torch.accelerator`.
    TORCH_NPU_DEVICE_CAPABILITY, an environment variable of torch_npu
        why:  torch.distributed.broadcast, in torch 2.13, asks for the capability of the device of a tensor that says it is
              on CUDA, and fails on the None that torch_npu answers.
        how:  8.0 unless it is set; what is asked matters to fp8 tensors alone. The warning that goes with it is filtered.
        when: torch_npu answers with numbers.
    torch.Tensor.type
        why:  Megatron's optimizers tell trainable tensors by names such as torch.cuda.FloatTensor.
        how:  it names tensors on the NPU torch.cuda.
        when: Megatron asks for the type and the device.

without_te: Megatron-core without Transformer Engine, and on newer torch and numpy, whatever the device; the hosts install it.
    transformer.multi_latent_attention.HAVE_TE
        why:  0.16 has it true without Transformer Engine, and then calls isinstance with a class that is None.
        how:  false.
        when: its import fails where Transformer Engine is missing.
    transformer.moe.moe_utils.te_general_gemm
        why:  0.16's router asks whether it is None, and has the name with Transformer Engine alone.
        how:  None.
        when: its import fails where Transformer Engine is missing.
    optimizer.distrib_optimizer.quantize_param_shard
        why:  without Transformer Engine 0.12 raises even when no parameter is fp8.
        how:  a function that does nothing.
        when: 0.12 is no longer supported.
    DistributedOptimizer._set_main_param_and_optimizer_states
        why:  it loads what the inner optimizer keeps; torch's Adam, used without Transformer Engine, keeps a step that
              is not stored for each parameter.
        how:  the step is handed over as it is.
        when: Megatron skips the step there, as it does when saving.
    dist_checkpointing.strategies.filesystem_async._write_item
        why:  before 0.14 it is called as torch 2.6 had it, without a serialization format.
        how:  the format it always had, torch.save.
        when: 0.12 is no longer supported.
    numpy.product
        why:  0.12 calls it in the checkpoints of a distributed optimizer; numpy 2 has it as prod alone.
        how:  that.
        when: 0.12 is no longer supported.
"""
