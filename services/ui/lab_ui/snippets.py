"""A request as code that runs: Python, curl in a POSIX shell, JavaScript, LangChain.

Knows quoting. The code contains the request and the proxy's public URL, and no key.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any


def python(request: Mapping[str, Any], proxy_url: str) -> str:
    """A script that prints the answer while it arrives. Every JSON string is also a Python string."""
    lines = ["from openai import OpenAI", "", f'client = OpenAI(base_url={_json(proxy_url + "/v1")}, api_key="local")']
    call = "completions" if "prompt" in request else "chat.completions"
    lines += [f"stream = client.{call}.create("]
    for name, value in request.items():
        if isinstance(value, list) and name == "messages":
            lines += [f"    {name}=[", *(f"        {_python(element)}," for element in value), "    ],"]
        else:
            lines += [f"    {name}={_python(value)},"]
    lines += ["    stream=True,", ")", "for chunk in stream:", "    if chunk.choices:"]
    piece = "chunk.choices[0].text" if "prompt" in request else 'chunk.choices[0].delta.content or ""'
    lines += [f'        print({piece}, end="", flush=True)', "print()"]
    return "\n".join(lines) + "\n"


def curl(request: Mapping[str, Any], proxy_url: str) -> str:
    """One command; `-N` prints each event when it arrives."""
    body = json.dumps({**request, "stream": True}, ensure_ascii=False, indent=1)
    path = "/v1/completions" if "prompt" in request else "/v1/chat/completions"
    return (
        f"curl -N {shlex.quote(proxy_url + path)} \\\n"
        "  -H 'Content-Type: application/json' \\\n"
        f"  --data-binary {shlex.quote(body)}\n"
    )


def javascript(request: Mapping[str, Any], proxy_url: str) -> str:
    """An ES module for Node with the `openai` package. JSON is valid JavaScript."""
    call = "completions" if "prompt" in request else "chat.completions"
    body = json.dumps({**request, "stream": True}, ensure_ascii=False, indent=2)
    piece = "chunk.choices[0]?.text" if "prompt" in request else "chunk.choices[0]?.delta?.content"
    return (
        'import OpenAI from "openai";\n\n'
        f'const client = new OpenAI({{ baseURL: {_json(proxy_url + "/v1")}, apiKey: "local" }});\n'
        f"const stream = await client.{call}.create({body});\n"
        f'for await (const chunk of stream) process.stdout.write({piece} ?? "");\n'
        'process.stdout.write("\\n");\n'
    )


def langchain(request: Mapping[str, Any], proxy_url: str) -> str:
    """A script with `langchain-openai` that streams the same request."""
    names = {"system": "system", "user": "human", "assistant": "ai"}
    options = {name: value for name, value in request.items() if name not in {"messages", "prompt", "model"}}
    lines = ["from langchain_openai import ChatOpenAI", "", "model = ChatOpenAI("]
    lines += [f"    model={_json(request.get('model'))},", f"    base_url={_json(proxy_url + '/v1')},"]
    lines += ['    api_key="local",', *(f"    {name}={_python(value)}," for name, value in options.items()), ")"]
    lines += ["messages = ["]
    for message in request.get("messages", []):
        if message.get("tool_calls") or message["role"] not in names:  # LangChain also accepts OpenAI's messages
            lines.append(f"    {_python(message)},")
        else:
            lines.append(f"    ({_json(names[message['role']])}, {_json(message['content'])}),")
    lines += ["]", "for chunk in model.stream(messages):", '    print(chunk.content, end="", flush=True)', "print()"]
    return "\n".join(lines) + "\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _python(value: Any) -> str:
    """A JSON value as a Python literal; only true, false and null differ."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_json(name)}: {_python(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_python, value)) + "]"
    return repr(value) if isinstance(value, bool) or value is None else _json(value)
