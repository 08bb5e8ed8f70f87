"""The ranks of an engine group: data parallel engines that step together, and their driver."""
