"""Routes that sample nothing: control of the replicas, weights, routed experts."""
