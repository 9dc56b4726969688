"""The tokens page: the same sentence in Korean and in English, cut by several tokenizers."""

from __future__ import annotations

import streamlit as st

from lab_ui import links, tokens
from lab_ui.answer import Fault
from lab_ui.charts import PRIMARY, SECOND, pairs
from lab_ui.drawing.charts import draw_chart
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_pieces, draw_table
from lab_ui.formats import dollars, number
from lab_ui.session import Session
from lab_ui.untrusted import span

session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts
state = st.session_state
KEPT = 64  # cuts of a session, each of at most 5,000 characters
KOREAN, ENGLISH = tokens.PAIRS["model"]
link = links.Link(
    "tokens", {"ko": links.Text(KOREAN), "en": links.Text(ENGLISH), "price": links.Number(2.5, 0.0, 1000.0)}
)


def main() -> None:
    link.read(st.query_params, state)
    st.title(texts("tokens.title"), anchor=False)
    st.markdown(texts("tokens.intro"))
    listing = proxy.models(session.key)
    if isinstance(listing, Fault):
        draw_fault(session, listing, "models", lambda: None)
        return
    # 1. The two texts.
    with st.container(horizontal=True):
        for name in tokens.PAIRS:
            st.button(texts(f"tokens.pair.{name}"), key=f"pair-{name}", on_click=take, args=(name,))
    left, right = st.columns(2)
    korean = left.text_area(texts("tokens.korean"), key=link.key("ko"), persist_state="session",
                            max_chars=tokens.MAX_TEXT)  # fmt: skip
    english = right.text_area(texts("tokens.english"), key=link.key("en"), persist_state="session",
                              max_chars=tokens.MAX_TEXT)  # fmt: skip
    link.write(st.query_params, state)
    if not korean or not english:
        st.info(texts("tokens.empty"))
        return
    # 2. Both by every tokenizer.
    names = tokens.tokenizers(listing)
    cuts: dict[str, tuple[tokens.Cut, tokens.Cut]] = {}
    faults: dict[str, Fault] = {}
    for name, (one, other) in cut_all(names, (korean, english)).items():
        if isinstance(one, Fault) or isinstance(other, Fault):
            faults[name] = one if isinstance(one, Fault) else other  # type: ignore[assignment] # one of them is
        else:
            cuts[name] = one, other
    if not cuts:
        draw_fault(session, next(iter(faults.values())), "tokenize", lambda: None)
        return
    draw_comparison(cuts)
    # 3. The pieces.
    st.subheader(texts("tokens.pieces"), anchor=False)
    st.caption(texts("tokens.pieces_about"))
    for name, (one, other) in cuts.items():
        with st.container(border=True):
            st.markdown(span(name))
            for each in (one, other):
                draw_pieces(each.pieces[: tokens.SHOWN])
            if one.split:
                st.caption(texts("tokens.split", count=number(one.split)))
            table = st.expander(texts("tokens.table"), icon=":material/table:", type="compact", key=f"table-{name}",
                                on_change="rerun")  # fmt: skip
            if table.open:
                with table:
                    rows = [(str(p.id), p.label, p.data.hex(" ")) for p in [*one.pieces, *other.pieces][:200]]
                    draw_table(("id", texts("tokens.token"), texts("tokens.bytes")), rows, (0,), name)
    for name, fault in faults.items():
        st.caption(f"{span(name)}: {texts(f'faults.{fault.kind}.what')}")


def draw_comparison(cuts: dict[str, tuple[tokens.Cut, tokens.Cut]]) -> None:
    rows = [
        (name, texts(f"tokens.{language}"), each.count, number(each.count))
        for name, both in cuts.items()
        for language, each in zip(("korean", "english"), both, strict=True)
    ]
    words = "; ".join(f"{name}: {one.count} / {other.count}" for name, (one, other) in cuts.items())
    chart = pairs(rows, words=texts("tokens.alt", counts=words), label=texts("tokens.tokenizer"),
                  series=texts("tokens.language"), value=texts("tokens.count"), format=",d",
                  colours=(SECOND, PRIMARY))  # fmt: skip
    draw_chart(chart, texts, "tokens-chart")
    price = st.number_input(texts("tokens.price"), 0.0, 1000.0, step=0.5, key=link.key("price"),
                            persist_state="session", width=320)  # fmt: skip
    head = ("tokenizer", "korean", "english", "ratio", "per_token", "cost_korean", "cost_english")
    table = []
    for name, (one, other) in cuts.items():
        ratio = tokens.ratio(one, other)
        table.append((
            name, number(one.count), number(other.count), f"{ratio:.2f}×" if ratio else "–",
            f"{one.characters / max(one.count, 1):.2f} / {other.characters / max(other.count, 1):.2f}",
            f"${dollars(one.count * price / 1000)}", f"${dollars(other.count * price / 1000)}",
        ))  # fmt: skip
    draw_table([texts(f"tokens.{name}") for name in head], table, range(1, len(head)), texts("tokens.title"))


def cut_all(names: list[str], both: tuple[str, str]) -> dict[str, list[tokens.Cut | Fault]]:
    """Both texts by each tokenizer. What was cut before in this session is not asked for again."""
    kept: dict[tuple[str, str], tokens.Cut] = state.setdefault("cuts", {})
    if len(kept) > KEPT:
        kept.clear()
    missing = [(name, text) for name in names for text in dict.fromkeys(both) if (name, text) not in kept]
    made = dict(zip(missing, proxy.calls(len(missing), 8, lambda place: cut(*missing[place])), strict=True))
    kept |= {place: each for place, each in made.items() if not isinstance(each, Fault)}
    return {name: [kept.get((name, text)) or made[name, text] for text in both] for name in names}


def cut(name: str, text: str) -> tokens.Cut | Fault:
    reply = proxy.call("POST", "/v1/inspect/tokenize", session.key, body=tokens.body(name, text),
                       seconds=settings.status_timeout_seconds * 5)  # fmt: skip
    return reply if isinstance(reply, Fault) else tokens.cut(name, text, reply.body)


def take(name: str) -> None:
    state[link.key("ko")], state[link.key("en")] = tokens.PAIRS[name]


main()
