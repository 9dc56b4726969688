"""The next-token page: guess, see the probabilities, change them, step through a generation, look into the layers."""

from __future__ import annotations

from typing import Any

import streamlit as st

from lab_ui import chat, layers, links, next_token, surprise, wire
from lab_ui.answer import Fault
from lab_ui.charts import bars, grid, pairs
from lab_ui.drawing.charts import draw_chart
from lab_ui.drawing.components import draw_tokens
from lab_ui.drawing.faults import draw_fault
from lab_ui.drawing.html import draw_strip
from lab_ui.formats import number, percent
from lab_ui.session import Session
from lab_ui.untrusted import quote, span

session: Session = st.session_state.session
settings, proxy, texts = session.settings, session.proxy, session.texts
state = st.session_state
VIEWS = ("guess", "steps", "lens", "attention")
link = links.Link(
    "next",
    {
        "view": links.Choice(VIEWS), "q": links.Text(next_token.PROMPTS[0]), "temperature": links.Number(1.0, 0.0, 2.0),
        "top_k": links.Number(0, 0, 100), "top_p": links.Number(1.0, 0.05, 1.0), "min_p": links.Number(0.0, 0.0, 0.5),
    },
)  # fmt: skip


def main() -> None:
    link.read(st.query_params, state)
    st.title(texts("next_token.title"), anchor=False)
    st.markdown(texts("next_token.intro"))
    listing = proxy.models(session.key)
    models = {} if isinstance(listing, Fault) else chat.chat_models(listing)
    local = [name for name, each in models.items() if each["local"] and not each["alias_of"]]
    if not local:
        draw_fault(session, listing if isinstance(listing, Fault) else Fault("no_model"), "models", lambda: None)
        return
    view = st.segmented_control(
        texts("next_token.views"), VIEWS, format_func=lambda code: texts(f"next_token.view.{code}"),
        key=link.key("view"), persist_state="session", required=True, label_visibility="collapsed",
    )  # fmt: skip
    model = local[0]
    if len(local) > 1:  # on a change of the model the chosen tokens are dropped: models have different token ids
        model = st.selectbox(texts("settings.model"), local, key="next-model", persist_state="session", on_change=begin)
    with st.container(horizontal=True):
        for place, prompt in enumerate(next_token.PROMPTS):
            st.button(prompt, key=f"prompt-{place}", on_click=take, args=(prompt,))
    st.text_area(texts("next_token.prompt"), key=link.key("q"), persist_state="session", height=80,
                 max_chars=next_token.MAX_PROMPT, on_change=begin)  # fmt: skip
    text = state[link.key("q")]
    if not text:
        st.info(texts("next_token.empty"))
    else:
        draws = {"guess": draw_guess, "steps": draw_steps, "lens": draw_lens, "attention": draw_attention}
        draws[view or "guess"](model or local[0], text)
    link.write(st.query_params, state)


def sampling() -> dict[str, Any]:
    return {name: state[link.key(name)] for name in ("temperature", "top_k", "top_p", "min_p")}


def draw_sliders() -> None:
    one, two, three, four = st.columns(4)
    one.slider(texts("settings.temperature"), 0.0, 2.0, step=0.1, key=link.key("temperature"),
               persist_state="session", help=texts("next_token.temperature_help"))  # fmt: skip
    two.slider("top_k", 0, 100, key=link.key("top_k"), persist_state="session", help=texts("next_token.top_k_help"))
    three.slider("top_p", 0.05, 1.0, step=0.05, key=link.key("top_p"), persist_state="session",
                 help=texts("next_token.top_p_help"))  # fmt: skip
    four.slider("min_p", 0.0, 0.5, step=0.01, key=link.key("min_p"), persist_state="session",
                help=texts("next_token.min_p_help"))  # fmt: skip


# ---- guess, then the bars


def draw_guess(model: str, text: str) -> None:
    chosen: list[wire.Piece] = state.setdefault("next_chosen", [])
    shown = next_token.text_after(text, chosen)
    st.markdown(quote(shown[-600:]) + " **▁**")
    score: next_token.Score = state.setdefault("next_score", next_token.Score())
    if not state.get("next_open"):
        with (
            st.form("guess", clear_on_submit=True, border=False),
            st.container(horizontal=True, vertical_alignment="bottom"),
        ):
            guess = st.text_input(texts("next_token.your_guess"), max_chars=40, placeholder="…")
            sent = st.form_submit_button(texts("next_token.look"), type="primary", icon=":material/visibility:")
        if not sent:
            draw_score(score)
            return
        state.next_open, state.next_guess, state.next_counted = True, guess.strip(), False
        st.rerun()
    body = {"model": model, "text": text, "token_ids": [each.id for each in chosen], "top": next_token.TOP} | sampling()
    if not chosen:
        del body["token_ids"]
    reply = proxy.call("POST", "/v1/inspect/next-token", session.key, body=body)
    if isinstance(reply, Fault):
        draw_fault(session, reply, "next")
        return
    found = next_token.candidates(reply.body)
    guess = state.get("next_guess") or ""
    if guess:
        rank = next_token.rank_of(guess, found)
        if not state.next_counted:
            score.count(rank)
            state.next_counted = True
        key = "next_token.first" if rank == 1 else "next_token.rank" if rank else "next_token.missed"
        share = percent(found[rank - 1].probability, 1) if rank else ""
        (st.success if rank == 1 else st.info)(
            texts(key, guess=span(guess), rank=str(rank), share=share, top=str(next_token.TOP))
        )
    draw_score(score)
    draw_sliders()
    draw_bars(found, reply.body)
    # Continue with one of them.
    st.caption(texts("next_token.go_on"))
    with st.container(horizontal=True):
        for each in found[:8]:
            st.button(span(each.piece.label), key=f"choose-{each.piece.id}", on_click=choose, args=(each.piece,))
        if chosen:
            st.button(texts("next_token.begin"), icon=":material/restart_alt:", key="begin", type="tertiary",
                      on_click=begin)  # fmt: skip


def draw_score(score: next_token.Score) -> None:
    if score.rounds:
        draw_strip({
            texts("next_token.rounds"): number(score.rounds), texts("next_token.hits"): number(score.first),
            texts("next_token.five"): number(score.five),
        })  # fmt: skip


def draw_bars(found: list[next_token.Candidate], body: Any) -> None:
    before, after = texts("next_token.before"), texts("next_token.after")
    rows = []
    for each in found[: next_token.BARS]:
        mark = f" ✂ {each.cut_by}" if each.cut_by else ""
        rows.append((each.piece.label, before, each.probability, percent(each.probability, 2)))
        rows.append((each.piece.label, after, each.final, percent(each.final, 2) + mark))
    words = texts("next_token.alt", tokens=", ".join(f"{name} {text}" for name, _, _, text in rows[:10]))
    chart = pairs(rows, words=words, label=texts("tokens.token"), series=texts("next_token.series"),
                  value=texts("next_token.probability"), format=".0%")  # fmt: skip
    draw_chart(chart, texts, "next-chart")
    figures = {texts("next_token.kept"): number(wire.number(body, "kept"))}
    figures[texts("next_token.entropy")] = number(wire.number(body, "entropy_bits"), 2)
    figures[texts("next_token.vocabulary")] = number(wire.number(body, "vocabulary"))
    draw_strip(figures)


# ---- token by token


def draw_steps(model: str, text: str) -> None:
    st.markdown(texts("next_token.steps_about"))
    draw_sliders()
    begun: list[int] = state.setdefault("steps_ids", [])
    if st.button(texts("next_token.generate"), type="primary", icon=":material/play_arrow:"):
        begun, state.steps = [], None
        generate(model, text, begun)
    reply = state.get("steps")
    if reply is None:
        return
    if isinstance(reply, Fault):
        draw_fault(session, reply, "steps")
        return
    found = wire.scored(reply.body, "steps")
    kept: list[Any] = state.get("steps_kept", [])
    found = [*kept, *found]
    st.markdown(quote(text[-400:]))
    mean = surprise.mean_bits([token for token, _ in found])
    if mean is not None:
        st.caption(texts("surprise.about", bits=number(mean, 2),
                         perplexity=number(surprise.perplexity([token for token, _ in found]) or 0, 2)))  # fmt: skip
    picked = draw_tokens(surprise.view([token for token, _ in found]), texts, f"steps-{state.get('steps_number', 0)}",
                         continues=True)  # fmt: skip
    ids = [int(each) for each in reply.body.get("token_ids", [])]
    if picked is not None and picked[0] < len(ids):
        place, rank = picked
        token, others = found[place]
        state.steps_kept = [*found[:place], (surprise.chosen(token, rank), others)]
        generate(model, text, [*ids[:place], others[rank]])
        st.rerun()


def generate(model: str, text: str, begun: list[int]) -> None:
    body = {"model": model, "text": text, "max_tokens": 40, "top": 6} | sampling()
    if begun:
        body["token_ids"] = begun
    else:
        state.steps_kept = []
    state.steps = proxy.call("POST", "/v1/inspect/generate-steps", session.key, body=body)
    state.steps_number = state.get("steps_number", 0) + 1


# ---- layers


def draw_lens(model: str, text: str) -> None:
    """The most likely next tokens of each layer, and the probability of one token in all layers."""
    st.markdown(texts("next_token.lens_about", most=str(layers.MOST_TOKENS)))
    if st.button(texts("next_token.look_inside"), type="primary", icon=":material/layers:", key="lens-go"):
        state.lens = inspect("logit-lens", {"model": model, "text": text, "top": layers.TOP})
    reply = state.get("lens")
    if isinstance(reply, Fault):
        draw_fault(session, reply, "lens")
    if reply is None or isinstance(reply, Fault):
        return
    tokens, found = layers.lens(reply.body)
    cells = layers.cells(tokens, found)
    if not cells:
        return
    words = texts("next_token.lens_alt", layers=str(len(found)), tokens=str(len(tokens)))
    chart = grid(cells, words=words, x=texts("tokens.token"), y=texts("next_token.layer"),
                 value=texts("next_token.probability"), labels=len(tokens) <= 12)  # fmt: skip
    draw_chart(chart, texts, "lens-chart")
    st.subheader(texts("next_token.pin"), anchor=False)
    place = st.selectbox(texts("next_token.place"), range(len(tokens)), index=len(tokens) - 1,
                         format_func=lambda at: f"{at + 1} {tokens[at].label}", key="lens-place",
                         persist_state="session")  # fmt: skip
    choices = [token for token, _ in found[-1][place]]
    token = st.selectbox(texts("next_token.pinned"), choices, format_func=lambda each: each.label,
                         key=f"lens-token-{place}", persist_state="session")  # fmt: skip
    if token is not None:
        rows = layers.pinned(found, place, token)
        words = texts("next_token.pin_alt", token=token.label, layers=", ".join(f"{n}: {t}" for n, _, t in rows[-6:]))
        draw_chart(bars(rows, words=words, label=texts("next_token.layer"), value=texts("next_token.probability"),
                        domain=1.0, format=".0%"), texts, "pin-chart")  # fmt: skip


def draw_attention(model: str, text: str) -> None:
    st.markdown(texts("next_token.attention_about", most=str(layers.MOST_TOKENS)))
    count = int(state.get("attention_layers", 1))
    layer = st.number_input(texts("next_token.layer"), 0, max(count - 1, 0), key="attention-layer",
                            persist_state="session", width=200)  # fmt: skip
    if st.button(texts("next_token.look_inside"), type="primary", icon=":material/layers:", key="attention-go"):
        state.attention_asked = True
    if not state.get("attention_asked"):
        return
    reply = inspect("attention", {"model": model, "text": text, "layer": layer})
    if isinstance(reply, Fault):
        draw_fault(session, reply, "attention")
        return
    tokens, heads, all_layers = layers.attention(reply.body)
    if all_layers != count:
        state.attention_layers = all_layers
        st.rerun()
    if not heads:
        return
    head = st.selectbox(texts("next_token.head"), range(-1, len(heads)), key="attention-head", persist_state="session",
                        format_func=lambda at: texts("next_token.all_heads") if at < 0 else str(at))  # fmt: skip
    rows = layers.mean(heads) if head is None or head < 0 else heads[head]
    chart = grid(layers.attended(tokens, rows), words=texts("next_token.attention_alt", tokens=str(len(tokens))),
                 x=texts("next_token.attended"), y=texts("next_token.attending"), value=texts("next_token.share"),
                 labels=len(tokens) <= 12)  # fmt: skip
    draw_chart(chart, texts, "attention-chart")


def inspect(name: str, body: dict[str, Any]) -> Any:
    with st.spinner(texts("next_token.loading")):
        return proxy.call("POST", f"/v1/inspect/{name}", session.key, body=body)


def take(prompt: str) -> None:
    state[link.key("q")] = prompt
    begin()


def begin() -> None:
    state.next_chosen, state.next_open, state.next_guess = [], False, ""
    state.steps = state.lens = None


def choose(token: wire.Piece) -> None:
    state.next_chosen = [*state.next_chosen, token]
    state.next_open, state.next_guess = False, ""


main()
