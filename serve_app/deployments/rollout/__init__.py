"""The engine deployment, and what becomes of a finished rollout."""
