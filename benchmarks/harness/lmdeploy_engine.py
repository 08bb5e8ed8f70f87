"""LMDeploy's engine for a benchmark, on this CPU where there is no CUDA."""

import os
from typing import Any

STORMY: dict[str, Any] = {
    "backend": "lmdeploy",
    "dtype": "float16",  # float32 where the CPU's operators are used
    "engine_kwargs": {
        "eager_mode": True,
        "num_gpu_blocks": 300,  # few enough that rollouts lose theirs now and then
        "block_size": 16,
        "max_prefill_token_num": 256,
        "enable_prefix_caching": True,
    },
}


def without_cuda() -> None:
    """Run the real engine on this CPU, if that is all there is."""
    import torch

    if not torch.cuda.is_available():
        os.environ["LMDEPLOY_SKIP_WARMUP"] = "1"
        torch.set_num_threads(1)
        from tests.lmdeploy.cpu_backend import install

        install()
