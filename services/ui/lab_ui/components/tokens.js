// Tokens coloured by surprise. One tab stop; arrow keys move; Enter or a click opens the alternatives of a token.
// Token text is set by textContent: nothing in it is read as HTML.
export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const strip = parentElement.querySelector(".strip");
  const panel = parentElement.querySelector(".panel");
  strip.replaceChildren();
  panel.replaceChildren();
  panel.hidden = true;
  const percent = (p) => (p >= 0.9995 ? "100" : p >= 0.1 ? (100 * p).toFixed(1) : p >= 0.0005 ? (100 * p).toFixed(2) : "<0.05") + " %";
  const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  const buttons = [];

  function open(place) {
    const token = data.tokens[place];
    buttons.forEach((button, at) => button.setAttribute("aria-expanded", String(at === place)));
    panel.replaceChildren();
    const head = document.createElement("p");
    head.textContent = data.labels.token.replace("{text}", "“" + visible(token.text) + "”")
      .replace("{p}", percent(token.p)).replace("{bits}", token.bits.toFixed(1));
    panel.append(head);
    const list = document.createElement("div");
    list.className = "list";
    for (const [rank, other] of token.top.entries()) {
      const row = document.createElement(data.continues && !other.chosen ? "button" : "div");
      row.className = "row" + (other.chosen ? " chosen" : "");
      const name = document.createElement("span");
      name.className = other.raw ? "name raw" : "name";
      name.textContent = visible(other.text) || "␀";
      const bar = document.createElement("span");
      bar.className = "bar";
      const fill = document.createElement("i");
      fill.style.width = Math.max(1, 100 * other.p) + "%";
      bar.append(fill);
      const value = document.createElement("span");
      value.className = "value";
      value.textContent = percent(other.p);
      row.append(name, bar, value);
      if (row.tagName === "BUTTON") {
        row.type = "button";
        row.title = data.labels.go;
        row.setAttribute("aria-label", data.labels.go + ": " + visible(other.text) + ", " + percent(other.p));
        row.onclick = () => setTriggerValue("picked", { place, rank });
      }
      list.append(row);
    }
    panel.append(list);
    if (data.continues) {
      const hint = document.createElement("small");
      hint.textContent = data.labels.hint;
      panel.append(hint);
    }
    panel.hidden = false;
  }

  data.tokens.forEach((token, place) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = token.raw ? "token raw" : "token";
    button.tabIndex = place === 0 ? 0 : -1;
    button.style.setProperty("--share", Math.round(100 * token.share) + "%");
    button.textContent = token.raw ? token.text : visible(token.text);
    button.setAttribute("aria-label", visible(token.text).trim() + ", " + percent(token.p));
    button.setAttribute("aria-expanded", "false");
    button.onclick = () => open(place);
    button.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
      if (event.key === "Escape") { panel.hidden = true; button.setAttribute("aria-expanded", "false"); }
      if (!step) return;
      event.preventDefault();
      const next = Math.max(0, Math.min(buttons.length - 1, place + step));
      button.tabIndex = -1;
      buttons[next].tabIndex = 0;
      buttons[next].focus();
    };
    buttons.push(button);
    strip.append(button);
    if (!token.raw && token.text.includes("\n")) strip.append(document.createElement("br"));
  });
}
