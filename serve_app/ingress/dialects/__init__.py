"""How clients ask for a rollout, one file a dialect, and what the dialects share."""
