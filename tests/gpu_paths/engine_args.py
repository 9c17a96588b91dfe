"""A process in which vLLM takes this machine for one with eight H100s: its config classes check the engines' arguments.

`python -m tests.gpu_paths.engine_args MODEL CASES` prints, as JSON, for each case the arguments that an engine with
these settings would get, and what vLLM makes of them. Everything is imported as on a CPU first, because a build for the
CPU lacks CUDA's kernels; then the platform that the config classes ask is vLLM's own for CUDA.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from common.config.actors import GeneratorsConfig

MEMORY = 80 << 30
# Fields of EngineArgs that must reach the engine unchanged, and where VllmConfig has them.
KEPT = {
    "max_num_seqs": "scheduler_config.max_num_seqs",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
    "async_scheduling": "scheduler_config.async_scheduling",
    "kv_cache_memory_bytes": "cache_config.kv_cache_memory_bytes",
    "enable_prefix_caching": "cache_config.enable_prefix_caching",
    "gpu_memory_utilization": "cache_config.gpu_memory_utilization",
    "logprobs_mode": "model_config.logprobs_mode",
    "max_model_len": "model_config.max_model_len",
    "enforce_eager": "model_config.enforce_eager",
    "enable_sleep_mode": "model_config.enable_sleep_mode",
    "skip_tokenizer_init": "model_config.skip_tokenizer_init",
    "tensor_parallel_size": "parallel_config.tensor_parallel_size",
}
FOUND = {
    "executor": "parallel_config.distributed_executor_backend",
    "worker": "parallel_config.worker_cls",
    "dtype": "model_config.dtype",
    "graphs": "compilation_config.cudagraph_mode.name",
    "second_runner": "use_v2_model_runner",
}


def on_h100s() -> None:
    """Replaces the platform in every module of vLLM, and says that Triton works, as it does there."""
    import vllm.platforms

    sys.modules.setdefault("vllm._C_stable_libtorch", ModuleType("vllm._C_stable_libtorch"))  # kernels
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class H100s(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "NVIDIA H100 80GB HBM3"

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            return MEMORY

        def is_cumem_allocator_available(self) -> bool:
            return True  # it is compiled into builds for CUDA

        @classmethod
        def is_fully_connected(cls, device_ids: list[int]) -> bool:
            return True

        @classmethod
        def device_count(cls) -> int:
            return 8

    before = vllm.platforms.current_platform
    vllm.platforms._current_platform = here = H100s()
    for module in [module for name, module in sys.modules.items() if name.startswith(("vllm.", "actors."))]:
        for name, old, new in (("current_platform", before, here), ("HAS_TRITON", False, True)):
            if vars(module).get(name) is old:
                setattr(module, name, new)


def main(model: str, cases: str) -> None:
    from actors.generation.vllm_settings import engine_args

    on_h100s()
    results = []
    for settings in json.loads(cases):
        cfg, sleeps = GeneratorsConfig.model_validate(settings), settings["gpus"] < 1
        args = engine_args(
            Path(model),
            cfg,
            max_model_len=128,
            trust_remote_code=False,
            sleeps=sleeps,
            log_stats=False,
            caches_prefixes=sleeps,  # so both values occur
        )
        config = args.create_engine_config()
        results.append(
            {
                "passed": {name: getattr(args, name) for name in KEPT},
                "kept": {name: at(config, path) for name, path in KEPT.items()},
                **{name: str(at(config, path)) for name, path in FOUND.items()},
            }
        )
    refused = ""
    try:  # vLLM does check what it gets
        replace(args, max_num_seqs=300, max_num_batched_tokens=299).create_engine_config()
    except ValueError as error:
        refused = str(error)
    results.append({"refused": refused})
    print(json.dumps(results))


def at(config: Any, path: str) -> Any:
    for name in path.split("."):
        config = getattr(config, name)
    return config


if __name__ == "__main__":
    main(*sys.argv[1:])
