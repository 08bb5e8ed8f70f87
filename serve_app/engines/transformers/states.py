"""The states of the running batch in layers that keep no keys: linear attention, convolutions.

A row is one request's state, whatever its length, so rows are simply put side by side.
"""

from typing import Any

import torch
from transformers.cache_utils import LinearAttentionLayer


class StateLayer(LinearAttentionLayer):
    """States of one layer, each ``[rows, ...]``; made like a first request's own."""

    def __init__(self, first: LinearAttentionLayer) -> None:
        super().__init__(number_of_states=first.number_of_states)
        self.device, self.dtype = first.device, first.dtype
        self.is_conv_states_initialized = dict(first.is_conv_states_initialized)
        self.is_recurrent_states_initialized = dict(first.is_recurrent_states_initialized)
        self.has_previous_state = dict(first.has_previous_state)
        self.conv_kernel_size = dict(first.conv_kernel_size)

    def reserve(self, rows: int, columns: int) -> None:
        """Nothing: a row needs no columns, and comes with its memory."""

    def insert(self, row: int, layer: LinearAttentionLayer) -> None:
        """Add a request's own states as the last row."""
        pairs: Any = (
            (self.conv_states, layer.conv_states),
            (self.recurrent_states, layer.recurrent_states),
        )
        for mine, given in pairs:
            for index, state in given.items():
                if state is not None:
                    old = mine[index]
                    assert old is None or len(old) == row
                    mine[index] = state.clone() if old is None else torch.cat([old, state])

    def leave(self, row: int, last: int) -> None:
        """Remove a row; the last one takes its place."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    state[row] = state[last]
                    states[index] = state[:last]

    def begin_step(self, positions: torch.Tensor, width: int) -> None:
        """Nothing: the model updates the states in place."""
