"""Run the real LMDeploy 0.18.0 PyTorch engine on a CPU, for tests.

`install()` before `lmdeploy.pytorch.engine` is imported. Uniprocess executor, tensor parallel 1,
`eager_mode=True`; LMDEPLOY_SKIP_WARMUP=1 gives a start of about 1 s. Everything above the
operators is LMDeploy's own: scheduler, paged cache, prefix cache, chunked prefill, sampling, route
capture, sessions, aborts. Only the operators that need CUDA are replaced, by plain torch.

What they ignore: attention sinks and sliding windows, sparse attention, biases of experts,
quantization. So gpt-oss, DeepSeek-V3.2 and GLM-5 do not run here; their arrays, or what their MoE
blocks are given, are constructed in tests.
"""

# mypy: ignore-errors
# (It replaces typed parts of torch by others, and subclasses untyped ones.)

import contextlib
import functools

import torch

from tests.lmdeploy import cpu_gated_delta

FACTORIES = (
    *("empty", "zeros", "ones", "full", "tensor", "arange", "randn", "rand", "randint"),
    *("linspace", "eye", "asarray", "as_tensor", "scalar_tensor", "empty_strided"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "empty_permuted"),
)
METHODS = ("to", "new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")


def _cpu(x):
    """Any cuda device becomes the cpu."""
    if isinstance(x, str) and x.startswith("cuda"):
        return "cpu"
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    return x


def _on_cpu(fn):
    @functools.wraps(fn)
    def call(*args, **kwargs):
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return fn(*map(_cpu, args), **{k: _cpu(v) for k, v in kwargs.items()})

    return call


class _Event:
    def __init__(self, *args, **kwargs): ...
    def record(self, *args): ...
    def wait(self, *args): ...
    def synchronize(self): ...
    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


class _Stream(_Event):
    def wait_stream(self, *args): ...
    def wait_event(self, *args): ...
    def record_event(self, *args):
        return _Event()


@contextlib.contextmanager
def _stream_context(stream):
    yield


def _not_compiled(function=None, **options):
    """Needs no C++ compiler, and no seconds of compiling."""
    return function if function is not None else lambda function: function


def _patch_torch():
    stream, cuda = _Stream(), torch.cuda
    cuda.Stream, cuda.Event, cuda.stream = _Stream, _Event, _stream_context
    cuda.current_stream = cuda.default_stream = lambda *a, **k: stream
    for name in (
        "synchronize",
        "empty_cache",
        "set_device",
        "ipc_collect",
        "reset_peak_memory_stats",
    ):
        setattr(cuda, name, lambda *a, **k: None)
    cuda.current_device, cuda.device_count = lambda: "cpu", lambda: 1
    cuda.mem_get_info, cuda.get_device_name = (lambda *a: (2 << 30, 4 << 30)), (lambda *a: "cpu")
    cuda.get_device_properties = lambda *a: None
    cuda.get_rng_state, cuda.set_rng_state = (lambda *a: torch.get_rng_state()), (lambda *a: None)
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    torch.nn.Module.to = _on_cpu(torch.nn.Module.to)
    torch.Tensor.cuda = torch.nn.Module.cuda = torch.Tensor.pin_memory = lambda self, *a, **k: self
    torch.compile = _not_compiled
    torch.Tensor.record_stream = lambda self, *a, **k: None


def _backend():
    from lmdeploy.pytorch.backends.apply_rotary_emb import ApplyRotaryEmbBuildSpec
    from lmdeploy.pytorch.backends.attention import (
        AttentionImpl,
        AttentionMetadata,
        PagedAttentionBuildSpec,
    )
    from lmdeploy.pytorch.backends.default import DefaultOpsBackend
    from lmdeploy.pytorch.backends.default.apply_rotary_emb import DefaultApplyRotaryEmbImpl
    from lmdeploy.pytorch.backends.moe import FusedMoEBuildSpec, FusedMoEImpl
    from lmdeploy.pytorch.backends.multinomial_sampling import (
        MultinomialSamplingBuildSpec,
        MultinomialSamplingImpl,
    )

    class PagedAttention(AttentionImpl):
        def forward(self, q, k, v, k_cache, v_cache, attn_metadata, **unused):
            """q, k, v: [tokens, heads, head_dim]; caches: [blocks, block, kv_heads, head_dim].

            Latent attention, too: one head of keys, whose cache's beginning is the values'.
            """
            out = q.new_empty(*q.shape[:-1], v.shape[-1])
            start, block_size = 0, k_cache.shape[1]
            fresh, total = attn_metadata.q_seqlens.tolist(), attn_metadata.kv_seqlens.tolist()
            lengths = zip(fresh, total, strict=True)
            for seq, (n_q, n_kv) in enumerate(lengths):
                positions = torch.arange(n_kv)
                block = attn_metadata.block_offsets[seq].long()[positions // block_size]
                slot, new, span = (
                    positions % block_size,
                    slice(n_kv - n_q, n_kv),
                    slice(start, start + n_q),
                )
                k_cache[block[new], slot[new]] = k[span].to(k_cache.dtype)
                v_cache[block[new], slot[new]] = v[span].to(v_cache.dtype)
                group = self.num_heads // self.num_kv_heads
                keys = k_cache[block, slot].float().repeat_interleave(group, 1)
                values = v_cache[block, slot].float().repeat_interleave(group, 1)
                scores = torch.einsum("qhd,khd->hqk", q[span].float(), keys) * self.scale
                future = positions[None] > torch.arange(n_kv - n_q, n_kv)[:, None]
                weights = scores.masked_fill(future[None], float("-inf")).softmax(-1)
                out[span] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
                start += n_q
            return out

    class FusedMoE(FusedMoEImpl):
        def __init__(self, renormalize):
            self.renormalize = renormalize

        def forward(self, x, weights, ids, gate_up, down, *unused, **also_unused):
            """x: [tokens, hidden]; weights, ids: [tokens, topk]; gate_up, down: [experts, ...]."""
            if self.renormalize:
                weights = weights / weights.sum(-1, keepdim=True)
            out = torch.zeros_like(x, dtype=torch.float32)
            for expert in ids.unique().tolist():
                token, slot = (ids == expert).nonzero(as_tuple=True)
                gate, up = (x[token].float() @ gate_up[expert].float().T).chunk(2, -1)
                hidden = torch.nn.functional.silu(gate) * up
                out.index_add_(
                    0, token, hidden @ down[expert].float().T * weights[token, slot, None].float()
                )
            return out.to(x.dtype)

    class MultinomialSampling(MultinomialSamplingImpl):
        def forward(self, scores, seeds, offsets, indices=None):
            """scores, indices: [rows, tokens], sorted; what a row draws depends on its own seed."""
            rows = zip(scores.float().cumsum(-1), seeds.tolist(), offsets.tolist(), strict=True)
            place = []
            for total, seed, offset in rows:
                draw = torch.Generator().manual_seed(hash((seed, offset)))
                where = torch.searchsorted(total, total[-1] * torch.rand(1, generator=draw))
                place.append(int(where.clamp(max=int(total.argmax()))))
            return indices.gather(1, torch.tensor(place)[:, None]).view(-1)

    class ApplyRotary(DefaultApplyRotaryEmbImpl):
        def forward(self, query, key, cos, sin, inplace=True, **mode):
            """Heads may be wider than what is turned of them, which is their beginning."""
            width = cos.shape[-1]
            if width >= query.shape[-1] or mode.get("complex_mode"):
                return super().forward(query, key, cos, sin, inplace, **mode)
            turned = super().forward(query[..., :width], key[..., :width], cos, sin, False, **mode)
            rests = (query[..., width:], key[..., width:])
            return tuple(torch.cat(parts, -1) for parts in zip(turned, rests, strict=True))

    gated_delta = cpu_gated_delta.build_operators()

    class CpuBackend(DefaultOpsBackend):
        @staticmethod
        def get_name():
            return "cuda"

        @classmethod
        def build_op(cls, spec, *, enable_deterministic=False):
            if isinstance(spec, PagedAttentionBuildSpec):
                return PagedAttention(
                    spec.num_heads,
                    spec.head_dim,
                    scale=spec.scale,
                    num_kv_heads=spec.num_kv_heads,
                    v_head_size=spec.v_head_dim,
                )
            if isinstance(spec, ApplyRotaryEmbBuildSpec):
                return ApplyRotary()
            if isinstance(spec, FusedMoEBuildSpec):
                return FusedMoE(spec.renormalize)
            if isinstance(spec, MultinomialSamplingBuildSpec):
                return MultinomialSampling()
            if type(spec) in gated_delta:
                return gated_delta[type(spec)]()
            return super().build_op(spec, enable_deterministic=enable_deterministic)

        @staticmethod
        def get_attention_metadata_cls():
            return AttentionMetadata

        @classmethod
        def update_step_context(cls, step):
            ends = torch.nn.functional.pad(step.q_seqlens.cumsum(0), (1, 0))
            step.attn_metadata = AttentionMetadata(
                is_decoding=step.is_decoding,
                block_offsets=step.block_offsets,
                q_start_loc=step.q_start_loc,
                q_seqlens=step.q_seqlens,
                kv_seqlens=step.kv_seqlens,
                cu_seqlens_q=ends,
            )
            return step

        @staticmethod
        def device_count():
            return 1

        @staticmethod
        def support_ray():
            return True

    return CpuBackend


def _float32_for_float16(update):
    """Let a model asked for in float16 run in float32, where routes can be compared exactly."""

    @functools.wraps(update)
    def call(*args, **kwargs):
        found = update(*args, **kwargs)
        if found.dtype is torch.float16:
            found.dtype = torch.float32
            found.states_shapes = [(shape, torch.float32) for shape, _ in found.states_shapes]
        return found

    return call


@functools.cache
def install():
    """Patch torch and LMDeploy in this process, once."""
    _patch_torch()
    import lmdeploy.pytorch.config as config
    import lmdeploy.pytorch.envs as envs
    import lmdeploy.pytorch.nn.gated_delta as gated_delta
    import lmdeploy.utils as utils

    envs.enable_check_env = False
    config._update_torch_dtype = _float32_for_float16(config._update_torch_dtype)
    for module in (utils, config):
        if hasattr(module, "is_bf16_supported"):
            module.is_bf16_supported = lambda *a, **k: True
    import lmdeploy.pytorch.backends.selector as selector

    backend = _backend()
    selector._get_backend = lambda: backend
    gated_delta.build_rmsnorm_gated = cpu_gated_delta.GatedRMSNorm
