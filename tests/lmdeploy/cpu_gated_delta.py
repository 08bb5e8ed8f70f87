"""Linear attention for `cpu_backend`: a gated delta rule and its convolution, token by token."""

# mypy: ignore-errors
# (It subclasses untyped parts of LMDeploy.)

from itertools import pairwise

import torch
from torch.nn.functional import conv1d, silu


class GatedRMSNorm(torch.nn.Module):
    """What LMDeploy takes from flash-linear-attention."""

    def __init__(self, size, eps, activation, dtype, device):
        super().__init__()
        self.eps, self.weight = eps, torch.nn.Parameter(torch.ones(size, dtype=dtype))

    def forward(self, x, gate):
        scale = (x.float().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * scale * self.weight * silu(gate.float())


def build_operators():
    """Return what builds each operator, by the spec that asks for it."""
    from lmdeploy.pytorch.backends import causal_conv1d, gated_delta_rule

    class Rule(gated_delta_rule.GatedDeltaRuleImpl):
        def chunk_gated_delta_rule(self, q, k, v, g, beta, initial_state, **rest):
            """q, k, v: [1, tokens, heads, dim]; initial_state: [slots, heads, v_dim, k_dim]."""
            rows, out = (q[0], k[0], v[0], g[0], beta[0]), torch.empty_like(v)
            spans = pairwise(rest["cu_seqlens"].tolist())
            for slot, span in zip(rest["state_indices"].tolist(), spans, strict=True):
                for token in range(*span):
                    one = (row[token].float() for row in rows)
                    out[0, token], initial_state[slot] = _step(*one, initial_state[slot])
            return out, initial_state

        def fused_recurrent_gated_delta_rule(self, q, k, v, g, beta, initial_state, **rest):
            """q, k, v: [sequences, 1, heads, dim]."""
            rows = (row.transpose(0, 1) for row in (q, k, v, g, beta))
            slots = rest["state_indices"]
            out, _ = self.chunk_gated_delta_rule(
                *rows, initial_state, cu_seqlens=torch.arange(len(slots) + 1), state_indices=slots
            )
            return out.transpose(0, 1), initial_state

    class Convolution(causal_conv1d.CausalConv1dImpl):
        def forward(self, x, weight, bias, conv_state, meta, activation):
            """x: [1, tokens, channels]; conv_state: [slots, channels, kernel], its last inputs."""
            out, ends = torch.empty_like(x), meta.cu_seqlens.tolist()
            for seq, slot in enumerate(meta.state_ids.tolist()):
                span = slice(ends[seq], ends[seq + 1])
                past = conv_state[slot][:, 1:]
                if meta.is_init is not None and meta.is_init[seq]:
                    past = torch.zeros_like(past)
                inputs = torch.cat((past, x[0, span].T), -1)
                conv_state[slot] = inputs[:, -conv_state.shape[-1] :]
                out[0, span] = silu(conv1d(inputs[None], weight, bias, groups=len(weight))[0].T)
            return out

        conv1d_fn = update_fn = None

    class Meta(gated_delta_rule.GatedDeltaMetaImpl):
        forward = staticmethod(gated_delta_rule.GatedDeltaMeta)

    return {
        gated_delta_rule.GatedDeltaMetaBuildSpec: Meta,
        gated_delta_rule.GatedDeltaRuleBuildSpec: Rule,
        causal_conv1d.CausalConv1dBuildSpec: Convolution,
    }


def _step(q, k, v, g, beta, state):
    """q, k: [heads, k_dim]; v: [heads, v_dim]; g, beta: [heads]; state: [heads, v_dim, k_dim]."""
    q, k = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (q, k))
    state = state.float() * g.exp()[:, None, None]
    change = (v - torch.einsum("hvk,hk->hv", state, k)) * beta[:, None]
    state = state + torch.einsum("hv,hk->hvk", change, k)
    return torch.einsum("hvk,hk->hv", state, q) * q.shape[-1] ** -0.5, state
