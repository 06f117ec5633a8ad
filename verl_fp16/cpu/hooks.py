"""What verl, torch and vLLM need on a CPU, as records. In place only in processes with ``VERL_PLATFORM=cpu``."""

from verl_fp16.patching import Hook, Package, Target
from verl_fp16.releases import SUPPORTED_VERL

VERL = Package("verl", SUPPORTED_VERL)

_WRAPPERS = "verl_fp16.cpu.wrappers:"

CPU_HOOKS: tuple[Hook, ...] = (
    Hook(
        name="cpu.platform",
        target=Target("verl.plugin.platform.platform_manager"),
        wrapper="verl_fp16.cpu.platform:select_cpu_platform",
        why="verl has no platform cpu, and falls back to nvidia without a GPU",
        how="registers one and selects it",
        since="0.9",
        until="verl has a platform cpu",
    ),
    Hook(
        name="cpu.device",
        target=Target("verl.utils.device"),
        wrapper="verl_fp16.cpu.device:no_accelerator",
        why="verl 0.8 looks for accelerators by itself, and calls functions on torch.cpu that are not there",
        how="lets it see none, and gives it a device module with those functions",
        before="0.9",
        until="verl 0.8 is not supported any more: later ones have platforms",
    ),
    Hook(
        name="cpu.process_group",
        target=Target("verl.utils.distributed:initialize_global_process_group_ray", ("timeout_second", "backend")),
        wrapper=_WRAPPERS + "gloo_process_group",
        why="verl builds the backend 'cpu:gloo,cpu:gloo', which torch refuses",
        how="passes backend='cpu:gloo' where the caller names none",
        until="verl builds the backend from the platform alone",
    ),
    Hook(
        name="cpu.engines",
        target=Target("verl.workers.engine.fsdp.transformer_impl"),
        wrapper=_WRAPPERS + "register_fsdp_engines",
        why="verl registers its FSDP engines for cuda and npu only",
        how="registers the same classes for the device cpu",
        until="verl registers them for cpu",
    ),
    Hook(
        name="cpu.load_fsdp1",
        target=Target("verl.utils.fsdp_utils:load_fsdp_model_to_gpu", ("model",)),
        wrapper=_WRAPPERS + "leave_model_in_place",
        why="verl builds the device 'cpu:cpu' to load an FSDP1 model",
        how="does nothing: the model is on the CPU already",
        until="verl asks the platform for the device",
    ),
    Hook(
        name="cpu.offload_fsdp1",
        target=Target("verl.utils.fsdp_utils:offload_fsdp_model_to_cpu", ("model",)),
        wrapper=_WRAPPERS + "leave_model_in_place",
        why="offloading moves shards that are on the CPU already, and FSDP1 asserts on the storage it frees",
        how="does nothing: the model is on the CPU already",
        until="verl asks the platform for the device",
    ),
    Hook(
        name="cpu.sync_module_states",
        target=Target("torch.distributed.fsdp._init_utils:_check_module_states_for_sync_module_states"),
        wrapper=_WRAPPERS + "accept_cpu_states",
        why="FSDP1 refuses to broadcast states that are on the CPU, which gloo can do",
        how="skips the check",
        until="torch checks the backend instead of the device",
    ),
    Hook(
        name="cpu.value_model",
        target=Target(
            "verl.utils.model:load_valuehead_model", ("local_path", "torch_dtype", "model_config", "trust_remote_code")
        ),
        wrapper=_WRAPPERS + "load_value_model",
        why="verl loads the critic with flash_attention_2, whatever attn_implementation says",
        how="loads the same class with the attention of the model's configuration",
        until="verl honours attn_implementation for the critic",
    ),
    Hook(
        name="cpu.pin_tensor",
        target=Target("torch:Tensor.pin_memory"),
        wrapper=_WRAPPERS + "leave_unpinned",
        why="FSDP1 pins what it offloads for the reference policy, which needs an accelerator",
        how="returns the tensor itself",
        until="torch ignores pin_memory without an accelerator",
    ),
    Hook(
        name="cpu.pin_memory",
        target=Target("torch.distributed.fsdp:CPUOffloadPolicy.__init__", ("pin_memory",)),
        wrapper=_WRAPPERS + "do_not_pin_memory",
        why="verl offloads the reference policy with pin_memory=True, which needs an accelerator",
        how="sets pin_memory=False",
        until="torch ignores pin_memory without an accelerator",
    ),
    Hook(
        name="cpu.vllm_weight",
        target=Target("vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
        wrapper=_WRAPPERS + "keep_unpacked_weight",
        why="vLLM's CPU build drops layer.weight after packing it, so the second weight sync has nowhere to go",
        how="keeps layer.weight beside the packed copy, which is rebuilt after each sync",
        until="vLLM's CPU build supports reloading weights",
    ),
    Hook(
        name="cpu.vllm_experts",
        target=Target(
            "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method:UnquantizedFusedMoEMethod._setup_kernel",
            ("self", "layer", "w13", "w2"),
        ),
        wrapper=_WRAPPERS + "pack_experts_again",
        why="vLLM's CPU build packs experts when they are loaded first and never again: after a weight sync it "
        "takes the new ones for packed and computes with nonsense",
        how="packs them after every load",
        until="vLLM's CPU build supports reloading weights",
    ),
)
