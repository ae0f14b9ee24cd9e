"""What Ray Serve's proxy says where the service itself says nothing: its process was lost with the request, or is being
started. The client would get 500 in plain text then, and is better served by 503, when to come back, and the API's own
form of errors. `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=image_cascade.components.serving.unanswered:middlewares`,
in the environment that Ray is started in, tells the proxy of it (the one in Python: HAProxy runs no callbacks).
"""

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from components.serving.errors import ServiceError

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
SERVES_OWN = "/-/"  # paths of Ray Serve's: its health and routes
LOST = ServiceError(503, "the service lost this request on the way; try again in a moment", retry_after=1)


def middlewares() -> list[Middleware]:
    """What the proxy puts around all that it answers."""
    return [Middleware(Answered)]


class Answered:
    """Where the proxy says nothing, or an error of its own, the API's form of it; what the API answers passes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(SERVES_OWN):
            await self._app(scope, receive, send)
            return
        started, replaced = False, False

        async def send_answered(message: Message) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started, replaced = True, is_lost(message)
                if replaced:
                    await LOST.response()(scope, receive, send)
            if not replaced:
                await send(message)

        await self._app(scope, receive, send_answered)
        if not started:
            await LOST.response()(scope, receive, send)


def is_lost(start: Message) -> bool:
    """Whether an answer is an error that the API did not write: it writes JSON."""
    kind = Headers(raw=list(start.get("headers", ()))).get("content-type", "")
    return start["status"] >= 500 and not kind.startswith("application/json")
