"""Routes of the families whose models LMDeploy 0.18 lets forget them."""
