"""The tools page: the schema of a function, the model's call, its result from the reader, the model's answer."""

from __future__ import annotations

import json

import streamlit as st

from lab_ui import cache, chat, links, tools
from lab_ui.answer import Fault
from lab_ui.drawing.code import draw_code
from lab_ui.drawing.faults import draw_fault
from lab_ui.session import Session
from lab_ui.untrusted import quote

session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts
state = st.session_state
link = links.Link(
    "tools",
    {"example": links.Choice(tuple(tools.EXAMPLES)), "choice": links.Choice(("required", "auto", "none")),
     "q": links.Text("")},
)  # fmt: skip


def main() -> None:
    link.read(st.query_params, state)
    st.title(texts("tools.title"), anchor=False)
    st.markdown(texts("tools.intro"))
    listing = proxy.models(session.key)
    models = {} if isinstance(listing, Fault) else chat.chat_models(listing)
    if not models:
        draw_fault(session, listing if isinstance(listing, Fault) else Fault("no_model"), "models", lambda: None)
        return
    # 1. The function and the question.
    st.subheader(texts("tools.step.function"), anchor=False)
    name = st.segmented_control(
        texts("tools.example"), [*tools.EXAMPLES], format_func=lambda code: texts(f"tools.examples.{code}"),
        key=link.key("example"), persist_state="session", required=True, on_change=begin,
    )  # fmt: skip
    example = tools.EXAMPLES[name or "weather"]
    schema = tools.parse_schema(
        st.text_area(texts("tools.schema"), json.dumps(example.schema, indent=2), height=230,
                     max_chars=tools.MAX_TEXT, key=f"schema-{name}", persist_state="session")
    )  # fmt: skip
    if schema is None:
        st.error(texts("tools.not_json"), icon=":material/error:")
        return
    model = st.selectbox(texts("settings.model"), list(models), key="tools-model", persist_state="session",
                         format_func=lambda id_: chat.model_label(id_, models, texts))  # fmt: skip
    question = st.text_input(texts("cache.question"), placeholder=example.question, key=link.key("q"),
                             persist_state="session", max_chars=links.MAX_TEXT) or example.question  # fmt: skip
    choice = st.segmented_control(
        texts("tools.choice"), tools.CHOICES, format_func=lambda code: texts(f"tools.choices.{code}"),
        key=link.key("choice"), persist_state="session", required=True, help=texts("tools.choice_help"),
    )  # fmt: skip
    link.write(st.query_params, state)
    request = tools.request(model or next(iter(models)), question, schema, choice or "auto")
    if st.button(texts("tools.ask"), type="primary", icon=":material/send:"):
        begin()
        with st.spinner(texts("cache.waiting")):
            state.tools_first = proxy.call("POST", cache.PATHS["chat"], session.key, body=request)
        state.tools_request = request
    if "tools_first" in state:
        draw_call(example)


def draw_call(example: tools.Example) -> None:
    """Draw the model's call, or its answer if it made none; then the result and the second answer."""
    first, request = state.tools_first, state.tools_request
    if isinstance(first, Fault):
        draw_fault(session, first, "tools")
        return
    # 2. The call.
    st.subheader(texts("tools.step.call"), anchor=False)
    message = tools.message(first.body)
    call = tools.call_of(message)
    if call is None:
        st.info(texts("tools.no_call"), icon=":material/info:")
        st.markdown(quote(str(message.get("content") or "")[:2000]))
        draw_code(session, request, "tools-code-first")
        return
    st.code(f"{call.name}({call.text})", language="python", wrap_lines=True)
    if call.arguments is None:
        st.warning(texts("tools.bad_arguments"), icon=":material/warning:")
    draw_code(session, request, "tools-code-first")
    # 3. The reader runs it.
    st.subheader(texts("tools.step.run"), anchor=False)
    st.caption(texts("tools.run_about"))
    result = example.run(call.arguments or {})
    result = st.text_area(texts("tools.result"), result, max_chars=tools.MAX_TEXT, height=68,
                          key=f"result-{call.id}", persist_state="session")  # fmt: skip
    second_request = tools.with_result(request, message, call, result)
    if st.button(texts("tools.send"), type="primary", icon=":material/send:"):
        with st.spinner(texts("cache.waiting")):
            state.tools_second = proxy.call("POST", cache.PATHS["chat"], session.key, body=second_request)
    if "tools_second" not in state:
        return
    # 4. The answer.
    st.subheader(texts("tools.step.answer"), anchor=False)
    second = state.tools_second
    if isinstance(second, Fault):
        draw_fault(session, second, "tools-second")
        return
    st.markdown(quote(str(tools.message(second.body).get("content") or "")[:4000]))
    draw_code(session, second_request, "tools-code-second")


def begin() -> None:
    for name in ("tools_first", "tools_second"):
        state.pop(name, None)


main()
