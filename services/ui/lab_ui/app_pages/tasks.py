"""The tasks page: the lecture's pipelines in 2023 and today, run by the lab; a batch editor; accuracy by language."""

from __future__ import annotations

from string import Template

import streamlit as st

from lab_ui import cache, chat, links, tasks
from lab_ui.answer import Fault
from lab_ui.charts import bars
from lab_ui.drawing.charts import draw_chart
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_strip, draw_table
from lab_ui.formats import percent
from lab_ui.proxy import Reply
from lab_ui.session import Session
from lab_ui.tools import message
from lab_ui.untrusted import plain, quote, span

session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts
state = st.session_state
link = links.Link("tasks", {"lesson": links.Choice(tuple(tasks.LESSONS)), "text": links.Choice(("en", "ko"))})
GENERATED = {"generation": "Large language models are", "hand": "The future of artificial intelligence is"}


def main() -> None:
    link.read(st.query_params, state)
    st.title(texts("tasks.title"), anchor=False)
    st.markdown(texts("tasks.intro"))
    listing = proxy.models(session.key)
    models = {} if isinstance(listing, Fault) else chat.chat_models(listing)
    if not models:
        draw_fault(session, listing if isinstance(listing, Fault) else Fault("no_model"), "models", lambda: None)
        return
    lesson = st.segmented_control(
        texts("tasks.lessons"), [*tasks.LESSONS], format_func=lambda code: texts(f"tasks.lesson.{code}"),
        key=link.key("lesson"), persist_state="session", required=True, label_visibility="collapsed",
    ) or "generation"  # fmt: skip
    # 1. The code, then and now.
    then = tasks.LESSONS[lesson]
    left, right = st.columns([2, 3])
    left.caption(texts("tasks.then"))
    left.code(then.code, language="python", wrap_lines=True)
    right.caption(texts("tasks.now"))
    right.code(Template(then.now).safe_substitute(url=settings.shown_proxy_url), language="python", wrap_lines=True)
    if then.works:
        st.info(texts(f"tasks.today.{lesson}"), icon=":material/info:")
    else:
        st.error(span(then.error), title=texts("tasks.raises"), icon=":material/error:")
        st.markdown(texts(f"tasks.today.{lesson}"))
    # 2. The lab runs it.
    st.subheader(texts("tasks.run"), anchor=False)
    if lesson in GENERATED:
        draw_generation(GENERATED[lesson])
    elif lesson == "sentiment":
        draw_sentiment()
    elif lesson == "question":
        draw_question()
    else:
        draw_chat(next(iter(models)))
    link.write(st.query_params, state)


def run(task: str, body: dict[str, object], name: str) -> Reply | None:
    """Draw the button of a task and run it when pressed. Returns the last answer; draws a fault and returns None."""
    if st.button(texts("tasks.button"), type="primary", icon=":material/play_arrow:", key=f"run-{name}"):
        with st.spinner(texts("cache.waiting")):
            state[f"task-{name}"] = proxy.call("POST", f"/v1/tasks/{task}", session.key, body=body)
    reply = state.get(f"task-{name}")
    if isinstance(reply, Fault):
        draw_fault(session, reply, f"task-{name}")
        return None
    return reply


def draw_source(reply: Reply) -> None:
    """Draw which model answered, and by which method."""
    st.caption(texts("tasks.source", model=plain(str(reply.body.get("model", ""))),
                     method=plain(str(reply.body.get("method", "")))))  # fmt: skip


def draw_generation(prompt: str) -> None:
    text = st.text_area(texts("tasks.text"), prompt, max_chars=tasks.MAX_TEXT, height=68, key=f"text-{prompt}",
                        persist_state="session")  # fmt: skip
    reply = run("text-generation", {"inputs": text or prompt, "parameters": {"max_new_tokens": 20}}, "generation")
    if reply:
        st.markdown(quote(tasks.generated(reply.body)[:4000]))
        draw_source(reply)


def draw_language() -> str:
    return st.segmented_control(
        texts("tasks.language"), ["en", "ko"], format_func=lambda code: texts(f"tasks.languages.{code}"),
        key=link.key("text"), persist_state="session", required=True,
    ) or "en"  # fmt: skip


def draw_sentiment() -> None:
    language = draw_language()
    known = dict(tasks.SENTENCES[language])
    text = st.text_area(texts("tasks.batch"), "\n".join(known), max_chars=tasks.MAX_TEXT, height=220,
                        key=f"batch-{language}", persist_state="session")  # fmt: skip
    inputs = tasks.lines(text)
    if not inputs:
        st.info(texts("tasks.empty"))
        return
    reply = run("sentiment-analysis", {"inputs": inputs}, f"sentiment-{language}")
    if reply:
        rows = []
        for each, found in zip(inputs, tasks.labels(reply.body), strict=False):
            if found:
                wanted = known.get(each)
                right = "–" if wanted is None else "✓" if (found[0].name.upper() == "POSITIVE") == wanted else "✗"
                rows.append((each, found[0].name, percent(found[0].score), right))
        draw_table([texts(f"tasks.column.{name}") for name in ("text", "label", "score", "right")], rows, (2,))
        draw_source(reply)
    st.subheader(texts("tasks.accuracy"), anchor=False)
    st.caption(texts("tasks.accuracy_about", count=str(len(known))))
    if st.button(texts("tasks.measure"), icon=":material/straighten:", key="measure"):
        state.accuracy = {
            name: proxy.call("POST", "/v1/tasks/sentiment-analysis", session.key,
                             body={"inputs": [text for text, _ in sentences]})
            for name, sentences in tasks.SENTENCES.items()
        }  # fmt: skip
    measured = state.get("accuracy", {})
    if fault := next((each for each in measured.values() if isinstance(each, Fault)), None):
        draw_fault(session, fault, "accuracy")
        return
    if measured:
        rates = []
        for name, each in measured.items():
            right_count, count = tasks.accuracy(tasks.labels(each.body), [want for _, want in tasks.SENTENCES[name]])
            share = right_count / count if count else 0.0
            rates.append((texts(f"tasks.languages.{name}"), share, f"{right_count} / {count}"))
        words = texts("tasks.accuracy_alt", rates=", ".join(f"{name} {text}" for name, _, text in rates))
        draw_chart(bars(rates, words=words, label=texts("tasks.language"), value=texts("tasks.accuracy"), domain=1.0,
                        format=".0%"), texts, "accuracy-chart")  # fmt: skip


def draw_question() -> None:
    language = draw_language()
    context, question = tasks.CONTEXTS[language]
    context = st.text_area(texts("tasks.context"), context, max_chars=tasks.MAX_TEXT, key=f"context-{language}",
                           persist_state="session")  # fmt: skip
    question = st.text_input(texts("cache.question"), question, max_chars=2000, key=f"question-{language}",
                             persist_state="session")  # fmt: skip
    force = st.toggle(texts("tasks.force"), key="force", persist_state="session", help=texts("tasks.force_help"))
    if not context or not question:
        st.info(texts("tasks.empty"))
        return
    body = {"inputs": {"question": question, "context": context}, "parameters": {"handle_impossible_answer": not force}}
    reply = run("question-answering", body, f"question-{language}")
    if reply:
        found, score = tasks.answer(reply.body)
        st.markdown(quote(found) if found else texts("tasks.no_answer"))
        draw_strip({texts("tasks.column.score"): percent(score, 2)})
        draw_source(reply)


def draw_chat(model: str) -> None:
    if st.button(texts("tasks.button"), type="primary", icon=":material/play_arrow:", key="run-chat"):
        body = cache.chat_body(model, "Explain large language models.", 60)
        with st.spinner(texts("cache.waiting")):
            state["task-chat"] = proxy.call("POST", cache.PATHS["chat"], session.key, body=body)
    reply = state.get("task-chat")
    if isinstance(reply, Fault):
        draw_fault(session, reply, "task-chat")
    elif reply is not None:
        st.markdown(quote(str(message(reply.body).get("content") or "")))


main()
