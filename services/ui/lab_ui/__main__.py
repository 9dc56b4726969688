"""`python -m lab_ui`: runs Streamlit with the lab's options on UI_HOST:UI_PORT until SIGTERM or Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import streamlit
from pydantic import ValidationError
from starlette.middleware import Middleware

from .settings import LOOPBACK, Settings

# Pages load from this server only: a remote image, font or frame in a model's answer would reveal its readers to
# another server. Streamlit's own pages need inline styles, one inline script and blobs. It loads the script of a
# component (drawing/components.py) as a blob, which only a script of the page can create.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; connect-src 'self'; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


class Guard:
    """ASGI middleware that adds HEADERS to every HTTP answer."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await self._app(scope, receive, guarded if scope["type"] == "http" else send)


def options(settings: Settings) -> dict[str, Any]:
    """Streamlit's options. They override its configuration files and environment variables."""
    hosts = {*LOOPBACK, "ui", settings.host, *settings.allowed_hosts}
    # A bundled font, because Streamlit's own has no Hangul and pages load from this server only. It has the 2,780 most
    # used syllables; the reader's own fonts draw the others.
    fonts = "Pretendard, 'Noto Sans KR', 'Noto Sans CJK KR', 'Apple SD Gothic Neo', 'Malgun Gothic', sans-serif"
    return {
        "server.address": settings.host,
        "server.port": settings.port,
        "server.headless": True,
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "runner.magicEnabled": False,  # no page writes a bare value; each script would be rewritten for it
        "server.enableCORS": True,
        "server.enableXsrfProtection": True,
        "server.allowedHosts": ["*"] if "*" in hosts else sorted(hosts - {"0.0.0.0", "::"}),  # noqa: S104
        "server.maxUploadSize": 1,
        "server.enableStaticServing": True,  # the font's files in static/
        "browser.gatherUsageStats": False,
        "client.toolbarMode": "viewer",
        "client.showErrorDetails": "none",
        "client.showErrorLinks": False,
        "logger.hideWelcomeMessage": True,
        "logger.level": "warning",
        "server.websocketPingInterval": 20,  # seconds: reverse proxies close a connection that is silent for longer
        "theme.font": fonts,
        "theme.fontFaces": [
            {"family": "Pretendard", "url": f"app/static/Pretendard-{name}.subset.woff2", "weight": weight}
            for name, weight in (("Regular", "400"), ("SemiBold", "600"))
        ],
        "theme.baseRadius": "medium",
        "theme.headingFontSizes": ["1.9rem", "1.35rem", "1.1rem"],
        "theme.headingFontWeights": [600, 600, 600],
        "theme.light.primaryColor": "#0c655d",
        "theme.light.backgroundColor": "#ffffff",
        "theme.light.secondaryBackgroundColor": "#f3f6f6",
        "theme.light.textColor": "#1c2b2d",
        "theme.dark.primaryColor": "#5eead4",
        "theme.dark.backgroundColor": "#10181a",
        "theme.dark.secondaryBackgroundColor": "#1a2528",
        "theme.dark.textColor": "#e4eced",
    }


def main() -> int:
    try:
        settings = Settings()
    except ValidationError as error:
        for problem in error.errors():
            variable = "".join(
                f"UI_{str(part).upper()}: " for part in problem["loc"][:1]
            )  # a rule over several settings has no name in `loc`
            print(f"{variable}{problem['msg'].removeprefix('Value error, ')}", file=sys.stderr)  # noqa: T201
        return 2
    app = streamlit.App(Path(__file__).with_name("app.py"), middleware=[Middleware(Guard)])
    app.run(config=options(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
