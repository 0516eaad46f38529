// Where the parts meet: connection, conversation, message field, panel, and the page's own buttons.

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { find } from "./dom.js";
import { currentLanguage, readPage, say, setLanguage, text } from "./i18n.js";
import { KeyDialog } from "./key.js";
import { showSpeed, showStatus } from "./panel.js";
import { Connection } from "./socket.js";
import { restore } from "./state.js";
import { keptTurns, remember } from "./store.js";

/** @typedef {import("./panel.js").Status} Status */
/** @typedef {import("./socket.js").LinkState} LinkState */

const POLL_MS = 5000;
const LOADING_POLL_MS = 1000;
/** Nearer to the end of the page than this, the reader follows what is written; in pixels. */
const NEAR = 160;

/** @type {Status | undefined} */
let status;
/** @type {LinkState} */
let link = "connecting";
let wasReady = false;
let atEnd = true;
/** The state that was last read out. */
let told = "";
/** The conversation before the last "new chat". @type {import("./state.js").Turn[]} */
let before = [];

readPage();

const connection = new Connection({
  onState(state, retryMs) {
    link = state;
    if (state === "ready") refresh();
    else {
      chat.lose();
      status = undefined; // it may come back as another server, or still loading its model
    }
    if (state === "key" || state === "wrong-key") keyDialog.ask(state === "wrong-key");
    showState(retryMs);
  },
  onFrame: (frame) => chat.hear(frame),
});

const keyDialog = new KeyDialog((key) => {
  connection.useKey(key);
  composer.focus();
});

const chat = new Chat({
  list: find("turns", HTMLElement),
  send: (frame) => connection.send(frame),
  prompts: () => status?.system_prompts ?? { zh: "", en: "" },
  copy,
  focus: () => composer.focus(),
  onChange() {
    find("welcome", HTMLElement).hidden = chat.turns.length > 0;
    find("undo-new", HTMLButtonElement).hidden = before.length === 0 || chat.turns.length > 0;
    composer.showRunning(chat.isRunning);
    follow();
  },
  onEnd(view, turn) {
    if (turn.ending) showSpeed(turn.ending);
    if (turn.status === "done") announce(text("answerSaid", { text: view.spoken }));
    if (turn.status === "stopped") announce(text("stopped"));
    refresh();
  },
});

const composer = new Composer({
  send(words, shot, agent) {
    if (chat.isRunning) composer.note("errBusy");
    else if (!connection.isReady || status?.status !== "ready") composer.note("errNotReady");
    else {
      atEnd = true;
      chat.say(words, shot, agent);
      return true;
    }
    return false;
  },
  stop: () => chat.stop(),
  limits: () => ({
    takes_images: status?.status !== "ready" || status.takes_images,
    ...(status?.limits ?? { max_body_bytes: 2 ** 25, max_image_pixels: 2e7 }),
  }),
});

/** Ask the server how it is. Now and then, and while the model is being loaded more often. */
async function refresh() {
  if (!connection.isReady) return;
  try {
    const answer = await fetch("status", { headers: connection.headers });
    if (answer.status === 401) connection.refuseKey();
    if (!answer.ok) return;
    status = /** @type {Status} */ (await answer.json());
    showStatus(status);
    showState(0);
    if (status.status === "loading") setTimeout(refresh, LOADING_POLL_MS);
  } catch {
    // the connection notices, and says so
  }
}

/**
 * Say in the header how things are, and above the conversation what keeps it from going on.
 * @param {number} retryMs
 */
function showState(retryMs) {
  const { key, more } = stateTexts();
  wasReady ||= link === "ready";
  const dot = find("state", HTMLElement);
  dot.dataset.state = key === "stateReady" ? "ready" : key === "stateLost" ? "bad" : "waiting";
  say(find("state-text", HTMLElement), key === "stateLost" ? "stateLostShort" : key);
  const calm = key === "stateReady" || key === "stateConnecting";
  find("banner", HTMLElement).hidden = calm;
  if (key !== told && key !== "stateConnecting") {
    if (told !== "" || !calm) announce(text(key)); // that all is well from the start is no news
    told = key;
  }
  if (calm) return;
  say(find("banner-text", HTMLElement), key);
  const detail = find("banner-more", HTMLElement);
  detail.hidden = more === "";
  if (more && retryMs) say(detail, more, { s: Math.ceil(retryMs / 1000) });
  else if (more && more !== "stateLostMore") say(detail, more);
  find("try-now", HTMLElement).hidden = key !== "stateLost";
  find("enter-key", HTMLElement).hidden = key !== "stateKey";
}

/** @returns {{key: string, more: string}} */
function stateTexts() {
  if (link === "key" || link === "wrong-key") return { key: "stateKey", more: "" };
  if (link === "lost" || (link === "connecting" && wasReady)) {
    return { key: "stateLost", more: "stateLostMore" };
  }
  if (link === "connecting" || !status) return { key: "stateConnecting", more: "" };
  if (status.status === "failed") return { key: "stateFailed", more: "stateFailedMore" };
  if (status.status === "loading") return { key: "stateLoading", more: "" };
  return { key: "stateReady", more: "" };
}

/**
 * Read out once, politely; answers are not read out token by token.
 * @param {string} words
 */
function announce(words) {
  find("announcer", HTMLElement).textContent = words;
}

/** Stay at the end of the page while an answer grows, unless the reader has gone up. */
function follow() {
  if (atEnd) scrollTo({ top: document.documentElement.scrollHeight });
}

/**
 * @param {HTMLElement} button
 * @param {string} words
 */
async function copy(button, words) {
  const label = /** @type {HTMLElement} */ (button.querySelector("span"));
  try {
    await navigator.clipboard.writeText(words);
    say(label, "copied");
    announce(text("copied"));
    setTimeout(() => say(label, "copy"), 1500);
  } catch {
    composer.note("errCopy"); // browsers allow it on https and localhost alone
  }
}

function listen() {
  addEventListener("scroll", () => {
    const page = document.documentElement;
    atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < NEAR;
  });
  find("new-chat", HTMLButtonElement).addEventListener("click", () => {
    if (chat.turns.length > 0) before = chat.turns;
    chat.show([]);
    showSpeed(undefined);
    composer.focus();
  });
  find("undo-new", HTMLButtonElement).addEventListener("click", () => {
    chat.show(before);
    composer.focus();
  });
  find("language", HTMLButtonElement).addEventListener("click", () => {
    setLanguage(currentLanguage() === "zh" ? "en" : "zh");
    announce(""); // said in the other language, and heard already
  });
  find("theme", HTMLButtonElement).addEventListener("click", () => {
    const root = document.documentElement;
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    remember("theme", root.dataset.theme);
    labelTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", labelTheme);
  const toggle = find("panel-toggle", HTMLButtonElement);
  toggle.addEventListener("click", () => {
    showPanel(toggle.getAttribute("aria-expanded") !== "true");
  });
  addEventListener("pointerdown", (event) => {
    const inside = event.target instanceof Element && event.target.closest("#panel, #panel-toggle");
    if (!inside) showPanel(false);
  });
  find("try-now", HTMLButtonElement).addEventListener("click", () => connection.retry());
  find("enter-key", HTMLButtonElement).addEventListener("click", () => keyDialog.ask(false));
  for (const example of document.querySelectorAll(".example")) {
    example.addEventListener("click", () => composer.fill(example.textContent ?? ""));
  }
  addEventListener("keydown", (event) => {
    if (document.querySelector("dialog[open]")) return;
    if (event.key === "Escape" && !event.isComposing) {
      if (chat.isRunning) chat.stop();
      else showPanel(false);
    }
    const plain = event.key.length === 1 && !event.ctrlKey && !event.metaKey && !event.altKey;
    if (plain && document.activeElement === document.body) composer.focus();
  });
}

/**
 * Where the window is narrow; a wide one always shows it.
 * @param {boolean} open
 */
function showPanel(open) {
  const panel = find("panel", HTMLElement);
  find("panel-toggle", HTMLElement).setAttribute("aria-expanded", String(open));
  panel.classList.toggle("open", open);
  panel.tabIndex = open ? 0 : -1; // it may be longer than the window, and is scrolled by keys
}

function labelTheme() {
  const key = document.documentElement.dataset.theme === "dark" ? "toLight" : "toDark";
  for (const place of ["aria-label", "title"]) say(find("theme", HTMLElement), key, {}, place);
}

listen();
labelTheme();
chat.show(restore(keptTurns()));
connection.open();
setInterval(() => !document.hidden && refresh(), POLL_MS);
