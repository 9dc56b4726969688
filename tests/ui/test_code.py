"""The code that Chat shows, before a real proxy: it asks the page's request, so that it hits the page's cache entry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fixtures_proxy import Bench, new
from fixtures_ui import ask
from streamlit.testing.v1 import AppTest


def hits(bench: Bench) -> int:
    count: int = bench.http.get("/status").json()["cache"]["hits"]
    return count


def test_python_and_curl_as_shown_hit_the_pages_entry(
    app: Callable[..., AppTest], bench: Bench, tmp_path: Path
) -> None:
    """One call to the model for the page, Python and curl."""
    page = app(url=bench.proxy.url, public_proxy_url=bench.proxy.url)
    before = hits(bench)
    page = ask(page, new())
    answer = page.session_state.turns[0].answer(0)
    assert (answer.state, answer.cache) == ("done", "miss"), answer
    page.session_state["code-0-0"] = True  # opened
    code, command, *_ = (block.value for block in page.run().code)
    (tmp_path / "ask.py").write_text(code, encoding="utf-8")
    for argv in ([sys.executable, str(tmp_path / "ask.py")], ["sh", "-c", command]):
        ran = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        assert answer.text in ran.stdout or "[DONE]" in ran.stdout
    assert bench.calls(bench.model)["total"] == 1
    assert hits(bench) == before + 2
