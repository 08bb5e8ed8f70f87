"""What becomes of a finished rollout's record: a key, an array, or the reason for neither."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from serve_app.config import EngineArgs
from serve_app.deployments.sampling.answer import Answer, Routes
from serve_app.deployments.sampling.group_rows import rows_in_common
from serve_app.deployments.sampling.routes import Earlier, RouteKeys
from serve_app.deployments.sampling.unread import Unread
from serve_app.errors import R3Error
from serve_app.records import part_of
from serve_app.types import FinishReason, GenerateRequest


class HandingOut:
    """One replica's records on their way to whoever asked for the rollouts."""

    def __init__(self, args: EngineArgs, keys: RouteKeys, unread: Unread) -> None:
        self._args = args
        self._keys = keys
        self._unread = unread

    async def hand_out(self, answer: Answer, earlier: Earlier | None) -> Routes:
        """Turn a finished rollout's record into a key or an array, or say why there is none."""
        assert answer.last is not None
        record = answer.last.record
        if not answer.request.return_routed_experts:
            return Routes()
        if not self._args.enable_return_routed_experts:
            return Routes(
                error="enable_return_routed_experts is off in this engine's configuration, so it"
                " records no experts"
            )
        if record is None:
            return Routes(error=_why_none(answer.last.finish_reason))
        if not self._args.enable_transfer_obj_ref:
            return Routes(record.ids, record.meta.rows)
        try:
            key = await self._keys.put(answer.request, record, earlier)
        except R3Error as error:
            return _no_key(error)
        if not self._unread.handed_out(answer.request.request_id, key):
            await self._keys.release([key])
            return Routes(error="the client went away before its key was there")
        rows = earlier.rows if earlier else 0
        return Routes(key, max(record.meta.stop, rows), continued_rows=rows)

    async def hand_out_group(
        self, request: GenerateRequest, answers: Sequence[Answer], earlier: Earlier | None
    ) -> list[Routes]:
        """Put the prompt's rows once, as the parent of those of all who have them whole."""
        rows = len(request.input_ids)
        whole = [
            answer.last.record
            for answer in answers
            if answer.last and answer.last.record and answer.last.record.meta.rows >= rows
        ]
        common = 0
        if len(whole) >= 2 and self._args.enable_transfer_obj_ref:
            common = await asyncio.to_thread(rows_in_common, whole, rows)
        if not common:
            return await self._each(answers, earlier, earlier, rows)
        prompt = await asyncio.to_thread(part_of, whole[0], 0, common)
        try:
            async with self._keys.shared_rows(request, prompt, earlier) as shared:
                routes = await self._each(answers, earlier, shared, rows)
        except R3Error as error:
            return [_no_key(error) for _ in answers]
        taken = earlier.rows if earlier else 0  # what the group shares is its own
        return [replace(one, continued_rows=min(one.continued_rows, taken)) for one in routes]

    async def _each(
        self,
        answers: Sequence[Answer],
        earlier: Earlier | None,
        shared: Earlier | None,
        rows: int,
    ) -> list[Routes]:
        """Hand out all; a record without the whole prompt does not build on the shared rows."""

        def base(answer: Answer) -> Earlier | None:
            record = answer.last.record if answer.last else None
            return shared if record is not None and record.meta.rows >= rows else earlier

        return await asyncio.gather(*(self.hand_out(answer, base(answer)) for answer in answers))


def _no_key(error: R3Error) -> Routes:
    return Routes(error=f"{type(error).__name__}: {error}")


def _why_none(finish_reason: FinishReason | None) -> str:
    if finish_reason == "abort":
        return "aborted before any token was processed"
    return f"the engine recorded nothing (finish reason {finish_reason})"
