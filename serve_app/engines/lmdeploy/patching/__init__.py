"""What we change in LMDeploy's own code, in every process that holds a model."""
