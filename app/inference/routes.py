"""`POST /v1/chat/completions`.

Does not cover: `/v1/responses`, which is absent.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from app.inference import answer
from app.inference.request import read
from app.inference.resolution import Resolver
from app.inference.schemas import ChatCompletion, ChatRequest
from app.inference.service import ChatService
from app.inference.stream import KEEP_ALIVE_S, events, first_look
from app.rendering.registry import load_renderer
from app.web.deps import CallerDep, services

router = APIRouter()


async def chat_service(request: Request) -> ChatService:
    """One per application: its caches and its queue are shared by all. Async, so that no two threads make it."""
    state = request.app.state
    if not hasattr(state, "chat"):
        here = services(request)
        state.chat = ChatService(
            Resolver(here.database, here.catalogue, load_renderer),
            here.samplers,
            max_model_len=here.settings.sampler_max_model_len,
        )
    made: ChatService = state.chat
    return made


_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "content": {"text/event-stream": {"schema": {"type": "string", "description": "chat.completion.chunk events"}}},
    }
}
ChatDep = Annotated[ChatService, Depends(chat_service)]


@router.post("/chat/completions", response_model=None, responses=_ANSWERS)
async def create_chat_completion(body: ChatRequest, request: Request, caller: CallerDep, chat: ChatDep) -> Response:
    """Answer with a base model, a fine-tuned model or a checkpoint.

    A stream starts when the answer is there, or after some seconds; until then an error still has its status.
    """
    ask = read(body)
    work = asyncio.create_task(chat.answer(caller.project_id, ask))

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    if not ask.stream:
        await first_look(work, gone, wait_s=None)
        return JSONResponse(answer.completion(ask, await work))
    if await first_look(work, gone, wait_s=KEEP_ALIVE_S):
        await work
    return StreamingResponse(events(work, lambda found: answer.chunks(ask, found)), media_type="text/event-stream")
