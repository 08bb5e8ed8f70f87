"""A local socket beside a shard's actor, for small calls from processes on its node.

A call to an idle actor passes through several of Ray's threads on either side, each of which has
to wake; a message passes from one event loop to the other. A turn of a conversation waits for two:
the headers of what it continues, and its own put.

A message is its length in four bytes and a pickle: a method and its argument one way, the result
or the `StoreError` the other. A connection carries one call at a time and is closed after
anything but an answer; the caller then asks the actor itself. The address is of Linux's abstract
kind, so a killed process leaves no file. Pickles come from processes of the same user id only:
either side looks who the other is.
"""

import asyncio
import os
import pickle
import secrets
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any

from serve_app.errors import StoreError, without_frames

_LENGTH = struct.Struct(">I")
_PEER = struct.Struct("3i")  # process, user, group
_AT_ONCE = 8
"""Calls of one process; the shard's event loop does one at a time anyway."""

Methods = Mapping[str, Callable[[Any], Awaitable[object]]]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class DoorShut(ConnectionError):
    """Nobody answers behind the door, or no longer; whether the last call was made is unknown."""


class OpenDoor:
    """The shard's side: answers until it is closed, or its process ends."""

    def __init__(self, methods: Methods) -> None:
        self._methods = methods
        self._server: asyncio.Server | None = None
        self._callers: set[asyncio.StreamWriter] = set()

    async def open(self) -> str | None:
        """Listen; return the address, None where the system has no such sockets."""
        address = f"\0r3serve-{secrets.token_hex(16)}"
        try:
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(address)
        except (AttributeError, OSError):
            return None
        self._server = await asyncio.start_unix_server(
            self._receive_caller, sock=listening, backlog=socket.SOMAXCONN
        )
        return address

    def close(self) -> None:
        """Answer nobody any more."""
        if self._server is not None:
            self._server.close()
        for writer in self._callers:
            writer.close()

    async def _receive_caller(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answer one connection's calls until it ends."""
        self._callers.add(writer)
        try:
            with closing(writer), suppress(EOFError, ConnectionError):
                while _is_same_user(writer.get_extra_info("socket")):
                    await self._answer(reader, writer)
        finally:
            self._callers.discard(writer)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one call; what it brought is not kept while the next is waited for."""
        method, argument = await _receive(reader)
        try:
            answer = await self._methods[method](argument)
        except StoreError as why:
            answer = without_frames(why)
        _send(writer, answer)
        await writer.drain()


class Door:
    """The caller's side, of one event loop: a connection for each of its calls, up to a limit."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._idle: list[Connection] = []
        self._free = asyncio.Semaphore(_AT_ONCE)

    async def call(self, method: str, argument: object) -> Any:
        """Return what the shard's method returns, or raise its `StoreError`.

        Raises `DoorShut` where the shard's process is gone. Has no timeout of its own: a call
        that is cancelled closes its connection.
        """
        async with self._free:
            reader, writer = self._idle.pop() if self._idle else await self._connect()
            try:
                _send(writer, (method, argument))
                await writer.drain()
                answer = await _receive(reader)
            except (EOFError, OSError) as error:
                writer.close()
                self.close()
                raise DoorShut(str(error)) from None
            except BaseException:
                writer.close()
                raise
            self._idle.append((reader, writer))
        if isinstance(answer, StoreError):
            raise answer
        return answer

    def close(self) -> None:
        """Close the connections that no call is using."""
        while self._idle:
            self._idle.pop()[1].close()

    async def _connect(self) -> Connection:
        with ExitStack() as undo:
            try:
                connecting = undo.enter_context(socket.socket(socket.AF_UNIX))
                connecting.setblocking(False)
                connecting.connect(self.address)
                if not _is_same_user(connecting):
                    raise DoorShut("another user's process answers here")
            except OSError as error:
                raise DoorShut(str(error)) from None
            connection = await asyncio.open_unix_connection(sock=connecting)
            undo.pop_all()
        return connection


def _send(writer: asyncio.StreamWriter, message: object) -> None:
    packed = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    writer.write(_LENGTH.pack(len(packed)))
    writer.write(packed)


async def _receive(reader: asyncio.StreamReader) -> Any:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return pickle.loads(await reader.readexactly(length))


def _is_same_user(peer: socket.socket) -> bool:
    packed = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, user, _ = _PEER.unpack(packed)
    return bool(user == os.geteuid())
