"""What can be seen of a running graph: metrics, events, loads of experts."""
