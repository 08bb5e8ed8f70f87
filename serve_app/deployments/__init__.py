"""Plain classes that Serve runs; only graphs/ turns them into deployments."""
