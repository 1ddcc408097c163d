"""Who asked to be notified of what, and telling them.

An observation is a pipe of aiocoap that stays open: no task, no timer. A notification is sent only
if the answer to the observer's own request is another one than the last that was sent.
Source: RFC 7641; `spec/resources.md`, rules C-20 to C-28.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable

import attrs
from aiocoap.message import Message
from aiocoap.numbers.codes import Code
from aiocoap.numbers.constants import Reliable
from aiocoap.pipe import Pipe

from netota_coap.catalog import Path
from netota_coap.coap.options import Option

Request = tuple[tuple[Option, ...], "bytes | None", str]
"""What `Responder.answer` takes."""

Answer = tuple[Code, bytes]
Answering = Callable[[tuple[Option, ...], "bytes | None", str], Answer]

_log = logging.getLogger(__name__)

_FIRST_NUMBER = 2  # Zephyr 1.14 drops the notification that is numbered 1
_NUMBERS = 1 << 24
_STRETCH_S = 0.01  # of notifying between two looks at the socket


@attrs.define(eq=False)
class _Observation:
    path: Path
    pipe: Pipe
    request: Request
    sent: Answer


@attrs.define
class Observers:
    """The observations of a server."""

    _by_path: dict[Path, dict[_Observation, None]] = attrs.field(init=False, factory=dict)
    _waiting: OrderedDict[_Observation, None] = attrs.field(init=False, factory=OrderedDict)
    _answering: Answering | None = attrs.field(init=False, default=None)
    _telling: asyncio.Task[None] | None = attrs.field(init=False, default=None)
    _number: int = attrs.field(init=False, default=_FIRST_NUMBER - 1)

    def __len__(self) -> int:
        return sum(len(observations) for observations in self._by_path.values())

    def add(self, path: Path, pipe: Pipe, request: Request, answer: Answer) -> None:
        """Register an observer and give it its first answer."""
        observation = _Observation(path, pipe, request, answer)
        self._by_path.setdefault(path, {})[observation] = None
        pipe.on_interest_end(lambda: self._remove(observation))
        pipe.add_response(self._message(answer), is_last=False)

    def notify(self, paths: Iterable[Path], answering: Answering) -> None:
        """Tell the observers of some paths their new state, those to whom it makes a difference.

        Args:
            paths: Of resources that changed, appeared or vanished.
            answering: Answers from the new state. A later call replaces that of an earlier one,
                so that a state that is passed already is not sent any more.
        """
        self._answering = answering
        for path in paths:
            self._waiting.update(self._by_path.get(path, {}))
        if self._waiting and (self._telling is None or self._telling.done()):
            self._telling = asyncio.get_running_loop().create_task(self._tell())

    def _remove(self, observation: _Observation) -> None:
        self._waiting.pop(observation, None)
        observations = self._by_path.get(observation.path, {})
        observations.pop(observation, None)
        if not observations:
            self._by_path.pop(observation.path, None)

    async def _tell(self) -> None:
        loop = asyncio.get_running_loop()
        answering: Answering | None = None
        answers: dict[Request, Answer] = {}
        pause = loop.time() + _STRETCH_S
        while self._waiting:
            if self._answering is not answering:
                answering, answers = self._answering, {}
            observation, _ = self._waiting.popitem(last=False)
            request = observation.request
            answer = answers.get(request)
            if answer is None and answering is not None:
                answer = answers[request] = _guarded(answering, request)
            if answer is not None and answer != observation.sent:
                self._send(observation, answer)
            if loop.time() >= pause:
                await asyncio.sleep(0)
                pause = loop.time() + _STRETCH_S

    def _send(self, observation: _Observation, answer: Answer) -> None:
        observation.sent = answer
        lives = answer[0].is_successful()
        message = self._message(answer) if lives else message_of(*answer)
        message.transport_tuning = Reliable()
        observation.pipe.add_response(message, is_last=not lives)

    def _message(self, answer: Answer) -> Message:
        message = message_of(*answer)
        message.opt.observe = self._next_number()
        return message

    def _next_number(self) -> int:
        self._number = max((self._number + 1) % _NUMBERS, _FIRST_NUMBER)
        return self._number


def _guarded(answering: Answering, request: Request) -> Answer:
    """Let a bug in one answer cost the observers of that one their observation, and no others."""
    try:
        return answering(*request)
    except Exception:  # noqa: BLE001 - whatever it is, the others must be told
        _log.exception("bug: the answer to an observer failed")
        return Code.INTERNAL_SERVER_ERROR, b""


def message_of(code: Code, tail: bytes) -> Message:
    """Turn an answer into aiocoap's form; a new object each time, since aiocoap changes it."""
    message = Message(code=code)
    message.payload = message.opt.decode(tail)
    return message
