"""Where LMDeploy builds the model that it serves, with what it lacks put in.

The model's own code stays as it is: hooks are hung on its modules before weights are loaded and
graphs are captured. Draft models of speculative decoding are built elsewhere, and left alone.
"""

from typing import Any

from lmdeploy.pytorch.engine.model_agent import agent

from serve_app.engines.lmdeploy.capture.dense import mend_dense_layers
from serve_app.engines.lmdeploy.capture.recording import record, records_itself

_build_patched_model = agent.build_patched_model


def install() -> None:
    """Change how this process builds models from now on. Idempotent."""
    agent.build_patched_model = build


def build(config: Any, device: Any = None, build_model_ctx: Any = None) -> Any:
    """Build a model as LMDeploy does, that returns its routes where the engine is to."""
    model = _build_patched_model(config, device=device, build_model_ctx=build_model_ctx)
    mend_dense_layers(model)
    if build_model_ctx.enable_return_routed_experts and not records_itself(model):
        text = config.llm_config
        text = getattr(text, "language_config", text)  # DeepSeek-VL2's
        record(model, text.num_hidden_layers, text.num_experts_per_tok)
    return model
