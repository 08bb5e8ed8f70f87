"""Workers of an engine group without GPUs: gloo, and an expert parallel operator of plain torch.

Importing this module patches its process, before anything of LMDeploy's engine is imported: Ray
imports it in a worker because the worker's class is here.
"""

# mypy: ignore-errors
# (It subclasses untyped parts of LMDeploy.)

import torch
import torch.distributed as dist

from tests.lmdeploy.cpu_backend import install

install()
torch.set_num_threads(1)

import lmdeploy.pytorch.backends.selector as selector  # noqa: E402
from lmdeploy.pytorch.backends.moe import FusedMoEBuildSpec, FusedMoEImpl  # noqa: E402

from serve_app.engines.lmdeploy.workers.worker import GroupWorker  # noqa: E402


class CpuWorker(GroupWorker):
    """A worker on a machine without CUDA."""


class ExpertParallel(FusedMoEImpl):
    """Every rank sees all tokens, computes its experts, and the sum comes back."""

    def __init__(self, spec):
        self.spec = spec

    def ep_expert_list(self, world_size, rank):
        count = self.spec.num_experts // world_size
        return list(range(rank * count, (rank + 1) * count))

    def forward(
        self, x, weights, ids, gate_up, down, gate_bias, down_bias, expert_list, act_func=None
    ):
        group, top_k = self.spec.ep_group, weights.shape[-1]
        if self.spec.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.spec.ep_size)]
        dist.all_gather(sizes, torch.tensor([len(x)]), group=group)
        most = max(int(size) for size in sizes)
        own = torch.zeros((most, x.shape[-1] + 2 * top_k))
        own[: len(x)] = torch.cat([x.float(), weights.float(), ids.float()], dim=-1)
        parts = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(parts, own, group=group)
        tokens, scale, chosen = torch.cat(parts).split([x.shape[-1], top_k, top_k], dim=-1)
        out = torch.zeros_like(tokens)
        for local, expert in enumerate(expert_list):
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            gate, up = (tokens[token] @ gate_up[local].float().T).chunk(2, -1)
            hidden = torch.nn.functional.silu(gate) * up
            out.index_add_(0, token, hidden @ down[local].float().T * scale[token, slot, None])
        dist.all_reduce(out, group=group)
        first = dist.get_rank(group) * most
        return out[first : first + len(x)].to(x.dtype)


def _all_reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
    """Sum what all ranks have; gloo's own takes more than twice as long for so few numbers."""
    assert op == dist.ReduceOp.SUM
    assert not async_op
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    tensor.copy_(torch.stack(parts).sum(0))


def _let_ranks_talk():
    backend = selector._get_backend()
    backend.ccl_backend = staticmethod(lambda: "gloo")
    dist.all_reduce = _all_reduce
    plain = backend.build_op.__func__

    def build_op(cls, spec, *, enable_deterministic=False):
        if isinstance(spec, FusedMoEBuildSpec) and spec.ep_size > 1:
            return ExpertParallel(spec)
        return plain(cls, spec, enable_deterministic=enable_deterministic)

    backend.build_op = classmethod(build_op)


_let_ranks_talk()
