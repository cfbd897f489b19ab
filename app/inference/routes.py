"""`POST /v1/chat/completions` and `POST /v1/responses`.

Does not cover: stored responses, of which there are none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from app.checkpoints.library import Library
from app.core.errors import NotFound
from app.inference import answer
from app.inference.request import Ask, read
from app.inference.resolution import Resolver
from app.inference.responses import answer as responses
from app.inference.responses.request import read as read_response
from app.inference.responses.schemas import ResponseObject, ResponsesRequest
from app.inference.schemas import ChatCompletion, ChatRequest
from app.inference.service import Answer, ChatService
from app.inference.stream import KEEP_ALIVE_S, Wire, events, first_look
from app.rendering.registry import load_renderer
from app.web.deps import CallerDep, services

router = APIRouter()


async def chat_service(request: Request) -> ChatService:
    """One per application: its caches and its queue are shared by all. Async, so that no two threads make it."""
    state = request.app.state
    if not hasattr(state, "chat"):
        here = services(request)
        state.chat = ChatService(
            Resolver(here.database, here.catalogue, load_renderer, Library.of(here.settings).locate),
            here.samplers,
            max_model_len=here.settings.sampler_max_model_len,
        )
    made: ChatService = state.chat
    return made


def _answers(model: Any, events: str) -> dict[int | str, dict[str, Any]]:
    stream = {"schema": {"type": "string", "description": events}}
    return {200: {"model": model, "content": {"text/event-stream": stream}}}


ChatDep = Annotated[ChatService, Depends(chat_service)]


@router.post(
    "/chat/completions",
    response_model=None,
    tags=["Chat"],
    responses=_answers(ChatCompletion, "chat.completion.chunk events"),
)
async def create_chat_completion(body: ChatRequest, request: Request, caller: CallerDep, chat: ChatDep) -> Response:
    """Answer with a base model, a fine-tuned model or a checkpoint.

    A stream starts when the answer is there, or after some seconds; until then an error still has its status.
    """
    ask = read(body)
    work = asyncio.create_task(chat.answer(caller.project_id, ask))
    return await _send(request, work, ask, answer.ChatEvents(ask), lambda found: answer.completion(ask, found))


@router.post(
    "/responses", response_model=None, tags=["Responses"], responses=_answers(ResponseObject, "response.* events")
)
async def create_response(body: ResponsesRequest, request: Request, caller: CallerDep, chat: ChatDep) -> Response:
    """Answer with a base model, a fine-tuned model or a checkpoint; nothing is stored.

    A stream starts when the answer is there, or after some seconds; until then an error still has its status.
    """
    ask = read_response(body)
    begun = responses.started(body, ask)
    work = asyncio.create_task(chat.answer(caller.project_id, ask))
    wire = responses.ResponseEvents(begun)
    return await _send(request, work, ask, wire, lambda found: responses.finished(begun, found))


@router.get("/responses/{response_id}", tags=["Responses"])
async def retrieve_response(response_id: str) -> ResponseObject:
    """Always 404: responses are not stored."""
    raise NotFound(f"Response with id '{response_id[:100]}' not found: this server stores no responses.")


async def _send(
    request: Request, work: asyncio.Task[Answer], ask: Ask, wire: Wire[Answer], whole: Callable[[Answer], Any]
) -> Response:
    """The answer as one JSON object or as events; a client that hangs up ends the work."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    if not ask.stream:
        await first_look(work, gone, wait_s=None)
        return JSONResponse(whole(await work))
    if await first_look(work, gone, wait_s=KEEP_ALIVE_S):
        await work
    return StreamingResponse(events(work, wire), media_type="text/event-stream")
