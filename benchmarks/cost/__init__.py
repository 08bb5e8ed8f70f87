"""What recording costs LMDeploy: engines and loops that are watched while they step."""
