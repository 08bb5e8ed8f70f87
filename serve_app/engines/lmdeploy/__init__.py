"""LMDeploy's PyTorch engine in the replica."""
