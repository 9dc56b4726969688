"""The same request as code that runs: Python with the `openai` package, and curl in a POSIX shell.

Knows quoting. The code holds nothing but the request: no key, no name of this machine but the proxy's public URL.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any


def python(request: Mapping[str, Any], proxy_url: str) -> str:
    """A script that prints the answer as it comes. Every JSON string is a Python string as well."""
    lines = ["from openai import OpenAI", "", f'client = OpenAI(base_url={_json(proxy_url + "/v1")}, api_key="local")']
    lines += ["stream = client.chat.completions.create("]
    for name, value in request.items():
        if isinstance(value, list):
            lines += [f"    {name}=[", *(f"        {_json(element)}," for element in value), "    ],"]
        else:
            lines += [f"    {name}={_json(value)},"]
    lines += ["    stream=True,", ")", "for chunk in stream:", "    if chunk.choices:"]
    lines += ['        print(chunk.choices[0].delta.content or "", end="", flush=True)', "print()"]
    return "\n".join(lines) + "\n"


def curl(request: Mapping[str, Any], proxy_url: str) -> str:
    """One command; `-N` shows each event as it comes."""
    body = json.dumps({**request, "stream": True}, ensure_ascii=False, indent=1)
    return (
        f"curl -N {shlex.quote(proxy_url + '/v1/chat/completions')} \\\n"
        "  -H 'Content-Type: application/json' \\\n"
        f"  --data-binary {shlex.quote(body)}\n"
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
