"""`chat --web`: serves the page of a conversation, and asks nothing of other machines."""

import asyncio
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mimo.border import printable, reason_of
from megatron_mimo.tools.generate.command import open_model
from megatron_mimo.tools.generate.config import ChatConfig

if TYPE_CHECKING:
    from gradio import Blocks

_LARGEST_IMAGE = "64mb"
# Gradio's button that publishes a message on another site, which the policy below keeps it from.
_STYLE = '[aria-label="Share"] { display: none; }'
# A browser that keeps its stream of events open must not hold up the end.
_LAST_WORDS_S = 1
_QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_RUN_HISTORY": "False",
}
# An answer may hold an image's address: a browser loads nothing that does not come from here.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "media-src 'self' data: blob:; worker-src 'self' blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]


def serve_chat(run: str, config: ChatConfig) -> int:
    """Load the model and serve its page until somebody presses Ctrl-C.

    Args:
        run: Folder of the run, or of a model.
        config: Values of the flags.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: gradio is missing, the port is taken, there is no model, or it is damaged; the
            message says which.
    """
    if config.image:
        raise ValueError(f"--image {config.image[0]} with --web: add images on the page")
    with tempfile.TemporaryDirectory(prefix="megatron-mimo-chat-") as uploads:
        # gradio reads both when it is imported.
        os.environ.update(_QUIET, GRADIO_TEMP_DIR=uploads)
        _require_gradio()
        with _listen(config.host, config.port) as listener:
            # Before the page, so that megatron-core is adapted to a host first.
            model = open_model(run, config.model)
            from megatron_mimo.tools.chat.page import build_page

            page = build_page(model, Path(run).resolve().name, config.sampling)
            _announce(listener)
            _serve(page, listener)
    return 0


def _require_gradio() -> None:
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "--web needs gradio, which is not installed: run `pip install gradio`, or install this "
            "package with its extra web"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything that takes long.

    Raises:
        ValueError: The port is taken, or the host is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        # What an earlier page leaves behind for a minute is not a busy port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ValueError(
            f"cannot listen at --host {host} --port {port}: {reason_of(error)}; "
            f"name another port, or an address of this machine"
        ) from error
    return listener


def _announce(listener: socket.socket) -> None:
    address, port = listener.getsockname()[:2]
    everywhere, loopback = (
        address in ("0.0.0.0", "::"),
        address.startswith("127.") or address == "::1",
    )
    name = "127.0.0.1" if everywhere else f"[{address}]" if ":" in address else address
    _write(f"open http://{name}:{port}/ in a browser; Ctrl-C ends it")
    if not loopback:
        _write(
            f"everybody who reaches port {port} of this machine can ask the model: there is no "
            f"password, and nothing is encrypted"
        )


def _serve(page: "Blocks", listener: socket.socket) -> None:
    import gradio
    import uvicorn
    from fastapi import FastAPI
    from fastapi.middleware.trustedhost import TrustedHostMiddleware

    address, port = listener.getsockname()[:2]
    app: Any = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        server_name=address,
        server_port=port,
        css=_STYLE,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size=_LARGEST_IMAGE,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
    )
    guarded: Any = _guarded(app)
    if address.startswith("127.") or address == "::1":
        # Another page in the same browser could reach this one under a name of its own.
        guarded = TrustedHostMiddleware(
            guarded, allowed_hosts=["localhost", "127.0.0.1", address], www_redirect=False
        )
    server = uvicorn.Server(
        uvicorn.Config(
            guarded,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_LAST_WORDS_S,
        )
    )
    # Answers and pages that Ctrl-C cuts off are no faults.
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    asyncio.run(server.serve(sockets=[listener]))


def _guarded(app: _App) -> _App:
    """The application with headers that keep a browser from asking other machines."""

    async def call(scope: _Message, receive: _Receive, send: _Send) -> None:
        async def send_with_headers(message: _Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await app(scope, receive, send_with_headers)

    return call


def _write(line: str) -> None:
    sys.stdout.write(f"{printable(line)}\n")
    sys.stdout.flush()
