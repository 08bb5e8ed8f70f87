"""LMDeploy's Ray executor: each GPU of an engine group is a worker actor beside its driver."""
