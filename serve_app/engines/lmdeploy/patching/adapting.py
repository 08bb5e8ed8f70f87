"""What we change in LMDeploy's own code, in every process that builds a model of it.

One way in: the replica of a single engine and each worker of a group call `adapt` before their
model is built, and `adapt_agent` once it is. Nothing else patches a worker.
"""

from typing import Any

from lmdeploy.pytorch import envs


def adapt(routes: bool) -> None:
    """Change this process's LMDeploy before a model is built; ``routes``: it records experts."""
    # Importing them compiles kernels, which a process without CUDA has to replace first.
    from serve_app.engines.lmdeploy.capture.patch import install
    from serve_app.engines.lmdeploy.patching.layers import gather_when_built

    envs.enable_check_env = False  # it starts a process for what the probe request proves
    install()  # without routes, too: it mends models that cannot run at all
    if routes:
        gather_when_built()


def adapt_agent(agent: Any) -> None:
    """Change the model agent that runs one GPU's part of the model, once its model is built."""
    _float32_logits(agent)
    _queue_routes(agent)


def _float32_logits(agent: Any) -> None:
    """Let logprobs and sampling be computed from float32.

    LMDeploy takes the softmax in the model's dtype: in bfloat16 a logprob of -4 is off by 0.03.
    """
    narrow = agent.get_logits
    agent.get_logits = lambda hidden: narrow(hidden).float()


def _queue_routes(agent: Any) -> None:
    """Let a step's routes be copied to the host behind the step, into pinned memory.

    LMDeploy copies each output by itself once the step is done, and waits for every copy.
    """
    push = agent._push_output

    def queue(output: Any) -> None:
        if output.all_routed_experts is not None:
            output.all_routed_experts = output.all_routed_experts.to("cpu", non_blocking=True)
        push(output)

    agent._push_output = queue
