// Conversations are in the browser's localStorage. The id of the tab's current one is in sessionStorage, so that a reload
// finds it. A conversation leaves the browser only when the reader opens it: then the ui receives it.
const STORE = "llm-lab-conversations", CURRENT = "llm-lab-conversation", MOST = 40, ROOM = 3_000_000;

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(STORE) || "[]");
    return Array.isArray(found) ? found.filter((each) => each && typeof each.id === "string") : [];
  } catch { return []; }
}

function write(list) {
  // The oldest are dropped, beyond MOST conversations or beyond the space that browsers permit.
  list = list.slice(0, MOST);
  while (list.length) {
    try {
      const text = JSON.stringify(list);
      if (text.length <= ROOM) { localStorage.setItem(STORE, text); return list; }
    } catch { /* no room, or no storage in this browser */ }
    list = list.slice(0, -1);
  }
  try { localStorage.removeItem(STORE); } catch { /* no storage */ }
  return list;
}

export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".history");
  let list = read();
  if (data.save && data.save.id) {
    const same = list.find((each) => each.id === data.save.id);
    const { updated, ...before } = same || {};
    if (!same || JSON.stringify(before) !== JSON.stringify(data.save)) {
      list = write([{ ...data.save, updated: Date.now() }, ...list.filter((each) => each.id !== data.save.id)]);
    }
  }
  try {
    // A new session that has nothing to show gets the conversation of this tab, once.
    const current = sessionStorage.getItem(CURRENT);
    const found = list.find((each) => each.id === current);
    if (data.fresh && found) setTriggerValue("opened", found);
    if (!data.fresh) sessionStorage.setItem(CURRENT, data.current || "");
  } catch { /* no storage */ }

  root.replaceChildren();
  if (!list.length) {
    const none = document.createElement("small");
    none.textContent = data.labels.none;
    root.append(none);
    return;
  }
  for (const each of list) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = each.title || "…";
    button.title = new Date(each.updated || 0).toLocaleString(data.language);
    if (each.id === data.current) button.setAttribute("aria-current", "true");
    button.onclick = () => setTriggerValue("opened", each);
    root.append(button);
  }
  const forget = document.createElement("button");
  forget.type = "button";
  forget.className = "forget";
  forget.textContent = data.labels.forget;
  forget.onclick = () => {
    write(list.filter((each) => each.id === data.current));
    root.replaceChildren();
  };
  root.append(forget);
}
