// Turns as elements. What people and the model write is set as text, never read as HTML.

import { icon, make } from "./dom.js";
import { draw, pointsOf } from "./draw.js";
import { showElapsed, showRate, showTime } from "./format.js";
import { say } from "./i18n.js";
import { actionOf, split } from "./state.js";
import { deed, pixels, place, sentence } from "./words.js";

/** @typedef {import("./state.js").Action} Action */
/** @typedef {import("./state.js").AnswerTurn} AnswerTurn */
/** @typedef {import("./state.js").Shot} Shot */
/** @typedef {import("./state.js").UserTurn} UserTurn */

/**
 * @typedef {object} Handlers
 * @property {() => void} retry
 * @property {(button: HTMLElement, text: string) => void} copy
 * @property {() => void} focus the message field
 */

/**
 * What a person said.
 * @param {UserTurn} turn
 * @returns {HTMLElement}
 */
export function userView(turn) {
  const article = make("article", { class: "turn user" });
  say(article, "you", {}, "aria-label");
  if (turn.shot) article.append(picture(turn.shot));
  article.append(make("p", { class: "said" }, turn.text));
  return article;
}

/**
 * @param {Shot} shot
 * @returns {HTMLImageElement}
 */
export function picture(shot) {
  const { url, width, height } = shot;
  const image = make("img", { class: "thumb", src: url, width, height });
  say(image, "screenshot", { width, height }, "alt");
  return image;
}

/** An answer, from its first moment on. */
export class AnswerView {
  #turn;
  #shot;
  #began = performance.now();
  #handlers;
  #status = make("p", { class: "status" });
  #summary = make("summary");
  #thought = make("p");
  #thinking = make("details", { class: "thinking", hidden: true }, this.#summary, this.#thought);
  #said = make("p", { class: "said", hidden: true });
  #end = make("div", { class: "end" });
  #touched = false;

  /**
   * @param {AnswerTurn} turn kept up to date by its owner, who then calls `update`
   * @param {Shot | undefined} shot that it speaks of
   * @param {Handlers} handlers
   */
  constructor(turn, shot, handlers) {
    this.#turn = turn;
    this.#shot = shot;
    this.#handlers = handlers;
    this.#summary.addEventListener("click", () => (this.#touched = true));
    this.element = make(
      "article",
      { class: "turn answer" },
      this.#thinking,
      this.#said,
      this.#status,
      this.#end,
    );
    say(this.element, "model", {}, "aria-label");
    this.update();
  }

  /** Show what the turn has become. */
  update() {
    const turn = this.#turn;
    const running = turn.status === "running";
    const action = actionOf(turn);
    const { thinking, answer } = action
      ? { thinking: action.thinking, answer: finishText(action) }
      : split(turn.text, running);
    this.element.setAttribute("aria-busy", String(running));
    this.#showThinking(thinking, running && answer === "");
    this.#said.hidden = answer === "";
    this.#said.textContent = answer;
    this.#said.classList.toggle("call", !action && /^(do|finish)\(/.test(answer));
    this.#status.hidden = !running;
    if (running) this.tick();
    else this.#showEnd(action);
  }

  /** The time goes on. */
  tick() {
    const { text, ahead } = this.#turn;
    const values = { time: showElapsed(performance.now() - this.#began), n: ahead ?? 0 };
    const reading = this.#shot ? "readingShot" : "reading";
    const waiting = ahead === undefined ? "sending" : ahead > 0 ? "queued" : reading;
    say(this.#status, text === "" ? waiting : "answering", values);
  }

  /**
   * The buttons belong to the last answer.
   * @param {boolean} last
   */
  markLast(last) {
    this.element.classList.toggle("last", last);
  }

  /** @returns {string} the answer as one hears it. */
  get spoken() {
    const action = actionOf(this.#turn);
    return action ? sentence(action) : split(this.#turn.text, false).answer;
  }

  /**
   * @param {string} thinking
   * @param {boolean} now it thinks just now
   */
  #showThinking(thinking, now) {
    this.#thinking.hidden = thinking === "";
    this.#thought.textContent = thinking;
    say(this.#summary, now ? "thinkingNow" : "thinking");
    // Open while it is written, folded once the answer begins, unless somebody chose otherwise.
    if (!this.#touched) this.#thinking.open = now;
  }

  /** @param {Action | undefined} action */
  #showEnd(action) {
    const turn = this.#turn;
    const parts = [];
    if (action) parts.push(actionView(action, this.#shot));
    if (turn.failure) parts.push(failureView(turn.failure));
    else if (turn.text === "" && turn.status === "done") parts.push(line("empty"));
    if (turn.status === "stopped") parts.push(line("stopped"));
    if (turn.ending?.finish_reason === "length") parts.push(line("lengthEnd"));
    const left = turn.ending?.usage?.dropped_messages;
    if (left) parts.push(line("dropped", { n: left }));
    this.#end.replaceChildren(...parts, ...statistics(turn), this.#tools());
  }

  #tools() {
    const turn = this.#turn;
    const tools = make("div", { class: "tools" });
    const again = button("again", turn.status === "done" ? "regenerate" : "retry");
    again.classList.add("only-last");
    again.addEventListener("click", () => {
      const byKey = again.matches(":focus-visible");
      this.#handlers.retry();
      if (byKey) this.#handlers.focus(); // the button is gone, and the focus with it
    });
    tools.append(again);
    if (turn.text !== "") {
      const copy = button("copy", "copy");
      const copied = () => actionOf(turn)?.text ?? split(turn.text, false).answer;
      copy.addEventListener("click", () => this.#handlers.copy(copy, copied()));
      tools.append(copy);
    }
    return tools;
  }
}

/** @param {Action} action */
function finishText(action) {
  return action.name === "finish" ? String(action.arguments.message ?? "") : "";
}

/**
 * @param {Action} action
 * @param {Shot | undefined} shot
 */
function actionView(action, shot) {
  const what = make("div", { class: "what" });
  const { key, values } = deed(action);
  what.append(line(key, values, "deed"));
  const where = place(action);
  if (where) what.append(line(where.key, where.values, "where"));
  const exact = shot && pixels(action, shot);
  if (exact) what.append(line(exact.key, exact.values, "exact"));
  if (where && !shot) what.append(line("noShot", {}, "exact"));
  if (action.name === "Tap" && action.arguments.message) {
    what.append(line("confirm", { text: String(action.arguments.message) }, "confirm"));
  }
  what.append(make("code", {}, action.text));
  const card = make("div", { class: "action" }, what);
  if (shot && Object.keys(pointsOf(action)).length) card.prepend(markedShot(action, shot));
  return card;
}

/**
 * @param {Action} action
 * @param {Shot} shot
 */
function markedShot(action, shot) {
  const { url, width, height } = shot;
  const image = make("img", { src: url, width, height });
  say(image, "screenshotMarked", { action: sentence(action) }, "alt");
  return make("div", { class: "shot" }, image, draw(action, { width, height }));
}

/** @param {import("./state.js").Failure} failure */
function failureView({ key, detail }) {
  const box = make("div", { class: "failure", role: "alert" }, icon("warning"));
  const words = make("div", {}, line(key));
  if (detail) words.append(line("serverSays", { text: detail }, "detail"));
  box.append(words);
  return box;
}

/** @param {AnswerTurn} turn */
function statistics({ ending }) {
  const { timings, usage, route } = ending ?? {};
  const lines = [];
  if (timings && usage && timings.predicted_n > 0) {
    const values = {
      rate: showRate(timings.predicted_per_second),
      first: showTime(timings.ttft_ms),
      n: usage.completion_tokens,
    };
    lines.push(line("statLine", values, "statistics"));
  }
  if (route) {
    const who = route.source === "local" ? "byDevice" : route.cached ? "byCloudBefore" : "byCloud";
    lines.push(line(who, { model: route.model, reason: route.reason }, "statistics"));
  }
  return lines;
}

/**
 * @param {string} key
 * @param {import("./i18n.js").Values} [values]
 * @param {string} [kind]
 */
function line(key, values = {}, kind = "notice") {
  const paragraph = make("p", { class: kind });
  say(paragraph, key, values);
  return paragraph;
}

/**
 * @param {string} drawing
 * @param {string} key
 */
function button(drawing, key) {
  const words = make("span");
  say(words, key);
  return make("button", { type: "button", class: "quiet" }, icon(drawing), words);
}
