"""The load page: starts a load test, shows it while it runs, and compares two finished ones."""

from __future__ import annotations

from urllib.parse import quote

import streamlit as st

from lab_ui import chat, links, load
from lab_ui.answer import Fault
from lab_ui.charts import lines, lines_of
from lab_ui.drawing.charts import draw_chart
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_strip, draw_table
from lab_ui.formats import milliseconds, number, percent
from lab_ui.proxy import Reply
from lab_ui.session import Session
from lab_ui.untrusted import plain

session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts
LIVE_SECONDS = 1.0
SHOWN = 12  # finished runs
link = links.Link(
    "load",
    {
        "workload": links.Choice(load.WORKLOADS),
        "users": links.Number(8, 1, load.MAX_USERS),
        "seconds": links.Number(20, 2, load.MAX_SECONDS),
    },
)


def main() -> None:
    link.read(st.query_params, st.session_state)
    st.title(texts("load.title"), anchor=False)
    st.markdown(texts("load.intro"))
    listing = proxy.models(session.key)
    if isinstance(listing, Fault) or not chat.chat_models(listing):
        draw_fault(session, listing if isinstance(listing, Fault) else Fault("no_model"), "models", lambda: None)
        return
    listed = load.call(proxy, settings, "GET", "/runs", key=load_key())
    if isinstance(listed, Fault):
        locked = listed.status == 401
        what = texts("load.locked.what" if locked else "load.absent.what")
        st.error(texts("load.locked.do" if locked else "load.absent.do"), title=what, icon=":material/error:")
        if locked:
            st.text_input(texts("load.key"), type="password", key="load_key", autocomplete="off",
                          persist_state="session")  # fmt: skip
        return
    draw_form()
    st.fragment(draw_live, run_every=LIVE_SECONDS)()
    draw_finished(listed)
    link.write(st.query_params, st.session_state)


def load_key() -> str | None:
    """LOAD_ADMIN_KEY as the reader entered it. The key for the proxy is not sent to the load service."""
    return st.session_state.get("load_key") or None


def draw_form() -> None:
    left, middle, right = st.columns(3)
    workload = left.selectbox(
        texts("load.workload"), load.WORKLOADS, key=link.key("workload"), persist_state="session",
        format_func=lambda name: texts(f"load.workloads.{name}"),
    )  # fmt: skip
    users = middle.number_input(texts("load.users"), 1, load.MAX_USERS, step=1, key=link.key("users"),
                                persist_state="session")  # fmt: skip
    seconds = right.number_input(texts("load.seconds"), 2, load.MAX_SECONDS, step=1, key=link.key("seconds"),
                                 persist_state="session")  # fmt: skip
    start, stop = st.columns(2)
    if start.button(texts("load.start"), type="primary", icon=":material/play_arrow:", width="stretch"):
        body = {"workload": workload, "users": int(users), "seconds": int(seconds)}
        draw_refusal(load.call(proxy, settings, "POST", "/runs", key=load_key(), body=body))
    if stop.button(texts("load.stop"), icon=":material/stop:", width="stretch"):
        draw_refusal(load.call(proxy, settings, "DELETE", "/runs/current", key=load_key()))


def draw_refusal(reply: Reply | Fault) -> None:
    if isinstance(reply, Fault):
        st.warning(plain(reply.message[:500]) or texts("load.refused"), icon=":material/block:")


def draw_live() -> None:
    """The running or last test, refreshed each second."""
    reply = load.call(proxy, settings, "GET", "/runs/current", key=load_key())
    if isinstance(reply, Fault):
        return
    progress = reply.body.get("progress") or []
    last = progress[-1] if progress else {}
    running = reply.body.get("state") == "running"
    st.subheader(texts("load.running" if running else "load.ended"), anchor=False)
    draw_strip({
        texts("load.fact.answers"): number(last.get("answers") or 0),
        texts("load.fact.failed"): number(last.get("failed") or 0),
        texts("load.fact.seconds"): number(last.get("seconds") or 0),
    })  # fmt: skip
    columns = st.columns(2)
    for place, name in enumerate(load.SERIES):
        points = load.series(progress, name)
        if len(points) > 1:
            label = texts(f"load.series.{name}")
            words = texts("load.alt", what=label, last=f"{points[-1][1]:.3g}")
            with columns[place % 2]:
                draw_chart(lines(points, words=words, x=texts("load.axis"), y=label), texts, f"load-{name}")
    answered = load.replicas(progress)
    if len(progress) > 1 and answered:
        label, replica = texts("load.replicas"), texts("load.replica")
        count = number(len({name for *_, name in answered}))
        chart = lines_of(answered, words=texts("load.replicas_alt", count=count), x=texts("load.axis"), y=label,
                         series=replica)  # fmt: skip
        draw_chart(chart, texts, "load-replicas")
    if not running and reply.body.get("code"):
        st.warning(texts(f"load.code.{reply.body['code']}" if reply.body["code"] in {1, 4, 5} else "load.code.other"))


def draw_finished(listed: Reply) -> None:
    """A table of the last runs, and a comparison of two of them."""
    names = [str(run["name"]) for run in listed.body.get("runs", ()) if isinstance(run, dict)][:SHOWN]
    key = load_key()
    kept: dict[str, load.Finished | None] = st.session_state.setdefault(
        "load_runs", {}
    )  # a finished run stays as it is
    missing = [name for name in names if name not in kept]

    def read(place: int) -> Reply | Fault:
        return load.call(proxy, settings, "GET", f"/runs/{quote(missing[place], safe='')}", key=key)

    for name, reply in zip(missing, proxy.calls(len(missing), 8, read), strict=True):
        if not isinstance(reply, Fault):
            kept[name] = load.read_finished(reply.body)
    found = {name: run for name in names if (run := kept.get(name)) is not None}
    st.subheader(texts("load.finished"), anchor=False)
    if not found:
        st.caption(texts("load.none"))
        return
    head = [texts(f"load.head.{name}") for name in ("name", "requests", "tokens", "ttft", "e2e", "hits", "checked")]
    draw_table(head, [row(run) for run in found.values()], range(1, 6), texts("load.finished"))
    if len(found) < 2:
        return
    left, right = st.columns(2)
    a = left.selectbox(texts("load.a"), list(found), index=1, key="load_a", persist_state="session")
    b = right.selectbox(texts("load.b"), list(found), index=0, key="load_b", persist_state="session")
    if found[a].sha256 != found[b].sha256:
        st.info(texts("load.different"), icon=":material/info:")
        return
    pairs = {name: (getattr(found[a], name), getattr(found[b], name)) for name in ("requests", "tokens", "ttft", "e2e")}
    rows = [
        [texts(f"load.head.{name}"), shown(name, x), shown(name, y), change(x, y)] for name, (x, y) in pairs.items()
    ]
    draw_table([texts("load.metric"), "A", "B", "B / A"], rows, (1, 2, 3), texts("load.compare"))
    st.caption(texts("load.once"))


def row(run: load.Finished) -> list[str]:
    checked = texts("load.trusted" if run.trusted and run.sums_hold else "load.not_trusted")
    hits = "–" if run.hit_ratio is None else percent(run.hit_ratio, 1)
    if not run.trusted:
        return [run.name, *["–"] * 5, checked]
    return [
        run.name,
        *(shown(name, getattr(run, name)) for name in ("requests", "tokens", "ttft", "e2e")),
        hits,
        checked,
    ]


def shown(name: str, value: float | None) -> str:
    return "–" if value is None else milliseconds(value) if name in {"ttft", "e2e"} else number(value, 2)


def change(a: float | None, b: float | None) -> str:
    found = load.ratio(a, b)
    return "–" if found is None else f"{found:+.1%}"


main()
