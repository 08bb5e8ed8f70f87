"""The rows of the forward pass under way."""

import torch


class Step:
    """Holds ``rows``, uint16 ``[tokens, layers, top_k]``, while a pass runs, and None between.

    How it outlives a CUDA graph: while one is captured, the rows are made and written by the
    pass itself, so their memory is the graph's own, and making and writing them are among its
    kernels. LMDeploy keeps what the captured pass returned as the graph's output. A replay runs
    the kernels again, on the same memory, and no Python: not ours, and none is missed, since
    which block writes which column never changes. LMDeploy clones the rows of real tokens.
    """

    def __init__(self, layers: int, top_k: int) -> None:
        self.layers = layers
        self.top_k = top_k
        self.rows: torch.Tensor | None = None

    def begin(self, tokens: torch.Tensor) -> torch.Tensor:
        """Make the rows of a pass over ``tokens``, 0 in columns that nobody will write."""
        shape = (tokens.numel(), self.layers, self.top_k)
        self.rows = tokens.new_zeros(shape, dtype=torch.uint16)
        return self.rows

    def write(self, layer: int, ids: torch.Tensor) -> None:
        """Write a layer's ids ``[tokens, top_k]``, in whatever shape of as many."""
        if self.rows is not None:
            column = self.rows[:, layer]
            column.copy_(ids.reshape(column.shape))  # where it does not fit, an error and no guess

    def end(self) -> None:
        """Let go of the rows."""
        self.rows = None
