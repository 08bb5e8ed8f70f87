"""What a decoder is called with, held against the batch: padding, packing, and where rows begin.

Rows of the batch are the decoder's tokens ``[B, T]``, flattened. A route on a padded token, a
sequence that begins where no position restarts, or a mask that packing does not survive would
give a forward pass of the right shape and of wrong numbers.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serve_app.errors import ReplayError
from serve_app.types import ExpertBatch

# What packed sequences see of each other; layers that carry state are found in the config.
UNPACKABLE = {
    "afmoe": "its masks ignore position_ids",
    "deepseek_v32": "its indexer picks keys of other sequences",
    "glm_moe_dsa": "its indexer picks keys of other sequences",
    "gpt_oss": "its masks ignore position_ids",
}
PACKABLE_WITH_OWN_MASKS = ("afmoe", "gpt_oss")


@dataclass(frozen=True, slots=True)
class DecoderInputs:
    """A call of a decoder: ``[rows, columns]`` tokens and what says which belong together."""

    rows: int
    columns: int
    tokens: torch.Tensor | None
    mask: Any
    positions: torch.Tensor | None
    flash_boundaries: torch.Tensor | None
    cached: bool

    @classmethod
    def of(
        cls, decoder: nn.Module, config: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "DecoderInputs":
        """Read a call by the names in the decoder's signature."""
        given = dict(inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        tokens = given.get("input_ids")
        embeds = given.get("inputs_embeds") if tokens is None else tokens
        shape = (0, 0) if embeds is None else embeds.shape
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(config, "use_cache", False)
        return cls(
            rows=shape[0],
            columns=shape[1],
            tokens=tokens,
            mask=given.get("attention_mask"),
            positions=_text_positions(given.get("position_ids")),
            flash_boundaries=given.get("cu_seq_lens_q"),
            cached=bool(use_cache) or given.get("past_key_values") is not None,
        )

    @property
    def has_own_mask(self) -> bool:
        """Whether masks were passed in that say for each pair of tokens what is seen."""
        is_2d = isinstance(self.mask, torch.Tensor) and self.mask.dim() == 2
        return self.mask is not None and not is_2d


class InputCheck:
    """Raises `ReplayError` for calls of a decoder that a batch was not made for."""

    def __init__(self, batch: ExpertBatch, family: str, config: Any) -> None:
        self._batch = batch
        self._family = family
        self._config = config
        self._boundaries: list[int] = batch.cu_seqlens.tolist()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Check one call; a forward pre-hook."""
        inputs = DecoderInputs.of(decoder, self._config, args, kwargs)
        if not inputs.rows:
            return  # the model says so
        self._check_kept_apart(inputs)
        tokens = inputs.rows * inputs.columns
        if tokens != len(self._batch.valid):
            return  # the routers say so
        self._check_mask(inputs)
        self._check_tokens(inputs)
        if tokens == self._boundaries[-1] and not inputs.has_own_mask:
            # Else a part of the batch's rows, and boundaries of all of them.
            self._check_packing(inputs)

    def _check_kept_apart(self, inputs: DecoderInputs) -> None:
        reason = _why_unpackable(self._family, self._config)
        if reason is None:
            return
        if self._family in PACKABLE_WITH_OWN_MASKS and inputs.has_own_mask:
            return
        if inputs.rows < (sequences := len(self._boundaries) - 1):
            raise ReplayError(
                f"{self._family} cannot keep packed sequences apart ({reason}): expected "
                f"{sequences} sequences in as many rows, found {inputs.rows} rows"
            )

    def _check_mask(self, inputs: DecoderInputs) -> None:
        if inputs.mask is None or inputs.has_own_mask:
            return
        # A mask is longer than the tokens where there is a cache.
        real = inputs.mask[:, -inputs.columns :].reshape(-1).bool()
        valid = self._batch.valid.to(real.device)
        if len(real) == len(valid) and bool((wrong := valid & ~real).any()):
            row = int(wrong.nonzero()[0])
            raise ReplayError(
                f"row {row} of the batch has routes, but is padding in the attention_mask"
                f" [{inputs.rows}, {inputs.columns}], at {list(divmod(row, inputs.columns))}:"
                " expected routes where the tokens are; the batch's padded layout is right-padded,"
                " so tokens must be too"
            )

    def _check_tokens(self, inputs: DecoderInputs) -> None:
        """Compare with the tokens that the routes were captured on, where both are known."""
        if inputs.tokens is None or self._batch.tokens is None:
            return
        given = inputs.tokens.reshape(-1)
        captured = self._batch.tokens.to(given.device)
        valid = self._batch.valid.to(given.device)
        if bool((wrong := valid & (captured >= 0) & (captured != given)).any()):
            row = int(wrong.nonzero()[0])
            raise ReplayError(
                f"row {row}: the batch's routes were captured on token {int(captured[row])}, the"
                f" forward pass has {int(given[row])} there"
            )

    def _check_packing(self, inputs: DecoderInputs) -> None:
        starts = self._starts_within(inputs.columns)
        if starts:
            self._check_mask_detects_packing(inputs, starts)
        if inputs.positions is None or inputs.mask is not None:
            return
        positions = inputs.positions.expand(inputs.rows, -1).reshape(-1)
        if len(positions) != len(self._batch.valid):
            return
        restarts = torch.ones(len(positions), dtype=torch.bool, device=positions.device)
        restarts[1:] = positions.diff() != 1
        expected = torch.zeros_like(restarts)
        expected[torch.tensor(starts, dtype=torch.long, device=expected.device)] = True
        within = self._within(inputs.columns).to(positions.device)
        wrong = (expected & ~restarts) | (within & restarts & ~expected)
        if bool(wrong.any()) and not self._flash_knows(inputs, starts):
            row = int(wrong.nonzero()[0])
            found = positions[row - 1 : row + 1].tolist()
            meant = "a sequence to begin" if row in starts else "a sequence to go on"
            raise ReplayError(
                f"row {row}: expected {meant} there, by the batch's cu_seqlens, found position_ids"
                f" {found[0]} and then {found[1]}: position_ids restart where a sequence begins"
            )

    def _check_mask_detects_packing(self, inputs: DecoderInputs, starts: list[int]) -> None:
        """Refuse what makes transformers take a row for one sequence, whatever its positions."""
        if self._flash_knows(inputs, starts):
            return
        flash = "flash" in str(getattr(self._config, "_attn_implementation", None))
        found = ""
        if inputs.positions is None:
            found = "no position_ids for each token"
        elif inputs.mask is not None:
            found = "a 2D attention_mask, which makes one sequence of a row"
        elif inputs.cached and not flash:
            found = "use_cache on, which makes one sequence of a row"
        if found:
            raise ReplayError(
                f"the batch has sequences that begin within a row, at rows {starts[:8]}: expected"
                f" position_ids that restart there, use_cache=False and no mask, found {found}"
            )

    def _starts_within(self, columns: int) -> list[int]:
        """Return the first rows of sequences, with routes in them, that share a row of tokens."""
        valid = self._batch.valid.cpu()
        return [
            begin
            for begin, end in zip(self._boundaries, self._boundaries[1:], strict=False)
            if begin % columns and bool(valid[begin:end].any())
        ]

    def _within(self, columns: int) -> torch.Tensor:
        """Return bool ``[tokens]``: rows with routes that follow one of their own sequence."""
        valid = self._batch.valid
        within = torch.zeros_like(valid)
        within[1:] = valid[1:] & valid[:-1]
        within[::columns] = False
        within[torch.tensor(self._boundaries[:-1], device=within.device)] = False
        return within

    def _flash_knows(self, inputs: DecoderInputs, starts: list[int]) -> bool:
        flash = "flash" in str(getattr(self._config, "_attn_implementation", None))
        if not flash or inputs.flash_boundaries is None:
            return False
        return set(starts) <= set(inputs.flash_boundaries.tolist())


def _text_positions(positions: torch.Tensor | None) -> torch.Tensor | None:
    """Return ``[B, T]``; of four axes the first is the text's, of three none tells of packing."""
    if positions is None or positions.dim() == 2:
        return positions
    if positions.dim() == 1:
        return positions[None]
    return positions[0] if len(positions) == 4 else None


def _why_unpackable(family: str, config: Any) -> str | None:
    kinds = {
        *(getattr(config, "layer_types", None) or ()),
        *(getattr(config, "layers_block_type", None) or ()),
    }
    if stateful := kinds & {"linear_attention", "mamba", "conv", "recurrent"}:
        return f"its {', '.join(sorted(stateful))} layers carry state along"
    return UNPACKABLE.get(family)
