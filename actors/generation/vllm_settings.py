"""vLLM's settings: for its process, its engine and each request. Runs in each generator.

Imported before vLLM, because vLLM reads its variables while it is imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from actors.generation.kv_cache import free_share_at_start, kv_cache_bytes
from common.config.actors import NEEDS_CPU, NEEDS_GPU, GeneratorsConfig, SamplingConfig
from common.errors import UserError
from common.model.size import model_size
from common.turns import CACHE_BLOCK

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine core must run in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# Worker processes are spawned: a fork of this process with its threads would hang. They inherit its cores and threads.
os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# All worker processes are on this node, so the loopback interface is enough.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
if not torch.cuda.is_available():
    # Otherwise 13 s go into compiling the kernel that ranks log-probabilities, with no gain at these sizes.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

# Changes for a request that samples from the whole distribution at the run's temperature, past end tokens.
WHOLE_DISTRIBUTION: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_tokens": 0,
    "stop": [],
    "stop_token_ids": [],
    "ignore_eos": True,
    "detokenize": False,
}


def sampling_settings(sampling: SamplingConfig, end_token_ids: list[int]) -> dict[str, Any]:
    """The arguments of every request's SamplingParams."""
    # Only stop texts need the text of every token, which takes 2 µs a token. It includes special tokens. The token that
    # completes a stop text stays in the response.
    stops = {"stop": list(sampling.stop), "include_stop_str_in_output": True, "skip_special_tokens": False}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "stop_token_ids": [*end_token_ids, *sampling.stop_token_ids],
        "logprobs": 0,  # of the sampled token only
        "detokenize": bool(sampling.stop),
        "output_kind": RequestOutputKind.FINAL_ONLY,
        **(stops if sampling.stop else {}),
    }


def token_bounds(settings: dict[str, Any], num_begun: int, max_tokens: int | None) -> dict[str, Any]:
    """The bounds of a request that continues a response of `num_begun` tokens by at most `max_tokens`."""
    longest = settings["max_tokens"] - num_begun
    if max_tokens is not None:
        longest = min(longest, max_tokens)
    # vLLM refuses a lower bound above the upper one.
    return {"max_tokens": longest, "min_tokens": max(0, min(settings["min_tokens"] - num_begun, longest))}


def engine_args(
    model: Path,
    cfg: GeneratorsConfig,
    *,
    max_model_len: int,
    trust_remote_code: bool,
    sleeps: bool,
    log_stats: bool,
    caches_prefixes: bool,
) -> EngineArgs:
    """vLLM's settings for exact versions, exact log-probabilities and weights that change."""
    on_cpu = current_platform.is_cpu()
    device_memory = 0 if on_cpu else current_platform.get_device_total_memory()
    if (cfg.gpus == 0) != on_cpu:
        raise UserError(NEEDS_CPU if on_cpu else NEEDS_GPU)
    return EngineArgs(
        model=str(model),
        # A tag of vLLM's metrics. By default it is the path, and Ray refuses tags with letters outside ASCII.
        served_model_name="policy",
        trust_remote_code=trust_remote_code,
        dtype=cfg.dtype,
        max_model_len=max_model_len,
        max_num_seqs=cfg.max_running,
        # A seeded request whose prompt is split over several steps rewinds its random generator, which vLLM 0.32
        # cannot do on CPU ("CPU Generator does not use offset"). So on CPU every prompt must fit into one step.
        enable_chunked_prefill=not on_cpu,
        max_num_batched_tokens=max(cfg.max_batched_tokens, cfg.max_running, max_model_len if on_cpu else 0),
        tensor_parallel_size=cfg.tensor_parallel,
        distributed_executor_backend="mp" if cfg.tensor_parallel > 1 else None,
        async_scheduling=not on_cpu,  # on the CPU a step only begins when it is waited for, so nothing would overlap
        kv_cache_memory_bytes=kv_cache_bytes(
            cfg,
            model_size(model),
            max_tokens=max_model_len,
            device_memory=device_memory,
        ),
        # Only for vLLM's check at the start that this share of the memory is free. The cache's size is given above.
        gpu_memory_utilization=0.9 if on_cpu else free_share_at_start(cfg, device_memory=device_memory),
        enable_sleep_mode=sleeps,
        enforce_eager=on_cpu,  # compiling for the CPU takes 71 s and gains at most 10 %
        # Log-probabilities after temperature and truncation, which describe the distribution that vLLM samples from.
        logprobs_mode="processed_logprobs",
        # Requests have salts (see VLLMEngine): otherwise the engine would use keys and values of old weights after an
        # update.
        enable_prefix_caching=caches_prefixes,
        # Only whole blocks are kept for the next turn. On the CPU, vLLM's own have 128 tokens; the smallest have 32.
        block_size=CACHE_BLOCK if caches_prefixes and on_cpu else None,
        skip_tokenizer_init=True,
        disable_log_stats=not log_stats,
    )
