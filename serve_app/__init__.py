"""r3serve: rollout routing replay for MoE RL as a Ray Serve deployment graph."""
