// The conversation being held: what is asked, what comes, what is stopped or asked again.

import { keepTurns } from "./store.js";
import { newAnswer, shotFor, toMessages } from "./state.js";
import { AnswerView, userView } from "./render.js";

/**
 * @typedef {import("./state.js").AnswerTurn} AnswerTurn
 * @typedef {import("./state.js").Ending} Ending
 * @typedef {import("./state.js").Failure} Failure
 * @typedef {import("./state.js").Shot} Shot
 * @typedef {import("./state.js").Turn} Turn
 * @typedef {import("./socket.js").Frame} Frame
 *
 * @typedef {object} Stage
 * @property {HTMLElement} list where turns are shown
 * @property {(frame: Frame) => boolean} send to the server; false: not connected
 * @property {() => {zh: string, en: string}} prompts that describe the actions
 * @property {(button: HTMLElement, text: string) => void} copy
 * @property {() => void} focus the message field
 * @property {() => void} onChange turns or running have changed
 * @property {(view: AnswerView, turn: AnswerTurn) => void} onEnd an answer has ended
 */

/** Asked for again, an answer is to be another one: the default takes the likeliest token. */
const OTHERWISE = { temperature: 0.8, top_p: 0.9 };

/** @type {Record<string, string>} */
const FAILURES = {
  invalid_api_key: "errKey",
  rate_limit_exceeded: "errQueue",
  busy: "errBusy",
  context_length_exceeded: "errContext",
  invalid_image: "errImage",
  invalid_image_url: "errImage",
  model_loading: "errLoading",
  shutting_down: "errStopping",
  does_not_fit: "errMemory",
  engine_busy: "errQueue",
  engine_error: "errServer",
  internal_error: "errServer",
  no_action: "errServer",
};

export class Chat {
  /** @type {Turn[]} */
  turns = [];
  #stage;
  /** The answer being made, its view and its id. @type {{turn: AnswerTurn, view: AnswerView, id: string} | undefined} */
  #running;
  /** The id that the server is busy with; it may go on for a moment after a stop. */
  #busyId = "";
  /** To be sent when the server is free. @type {Frame | undefined} */
  #next;
  #n = 0;
  #frame = 0;
  /** @type {AnswerView | undefined} */
  #last;

  /** @param {Stage} stage */
  constructor(stage) {
    this.#stage = stage;
    setInterval(() => this.#running?.view.tick(), 1000);
  }

  get isRunning() {
    return this.#running !== undefined;
  }

  /**
   * Say something and ask for an answer.
   * @param {string} text
   * @param {Shot | undefined} shot
   * @param {boolean} agent
   */
  say(text, shot, agent) {
    /** @type {Turn} */
    const turn = { role: "user", text, ...(shot ? { shot } : {}) };
    this.turns.push(turn);
    this.#stage.list.append(userView(turn));
    this.#ask(agent, {});
  }

  /** Ask for the last answer again; for another one where there was one. */
  retry() {
    const last = this.turns.at(-1);
    if (this.isRunning || last?.role !== "assistant") return;
    this.turns.pop();
    this.#last?.element.remove();
    const sampling = { ...OTHERWISE, seed: Math.floor(Math.random() * 2 ** 31) };
    this.#ask(last.agent, last.status === "done" ? sampling : {});
  }

  /** End the answer being made; what has come of it stays. */
  stop() {
    if (!this.#running) return;
    if (this.#next) this.#next = undefined;
    else this.#stage.send({ type: "cancel" });
    this.#finish("stopped");
  }

  /**
   * Show another conversation in place of this one.
   * @param {Turn[]} turns
   */
  show(turns) {
    this.stop();
    this.turns = turns;
    this.#stage.list.replaceChildren();
    this.#last = undefined;
    turns.forEach((turn, n) => {
      if (turn.role === "user") this.#stage.list.append(userView(turn));
      else this.#append(turn, n);
    });
    this.#changed();
  }

  /** @param {Frame} frame of the server */
  hear(frame) {
    // What is wrong with a question is told without its id; there is only one at a time.
    const id = frame.id ?? (frame.type === "error" ? this.#busyId : undefined);
    const ours = this.#running?.id === id ? this.#running : undefined;
    if (frame.type === "queued" && ours) ours.turn.ahead = frame.n_ahead;
    if (frame.type === "token" && ours) ours.turn.text += frame.text;
    if (frame.type === "queued" || frame.type === "token") this.#showSoon();
    if (frame.type !== "done" && frame.type !== "error") return;
    if (ours && frame.type === "done") {
      ours.turn.ending = /** @type {any} */ (frame);
      this.#finish(frame.finish_reason === "cancelled" ? "stopped" : "done");
    } else if (ours) {
      const { code, message, hint } = frame.error;
      const key = FAILURES[code] ?? "errOther";
      const detail = hint ? `${message}; ${hint}` : message;
      this.#fail(key === "errServer" ? { key } : { key, detail });
    }
    if (id === this.#busyId) this.#release();
  }

  /** The connection is gone, and the answer with it. */
  lose() {
    this.#busyId = "";
    this.#next = undefined;
    if (this.#running) this.#fail({ key: "errLost" });
  }

  /**
   * @param {boolean} agent
   * @param {Record<string, number>} sampling
   */
  #ask(agent, sampling) {
    const messages = toMessages(this.turns, agent, this.#stage.prompts());
    const turn = newAnswer(agent);
    const id = String((this.#n += 1));
    this.turns.push(turn);
    const view = this.#append(turn, this.turns.length - 1);
    this.#running = { turn, view, id };
    /** @type {Frame} */
    const frame = { type: "generate", id, messages, ...sampling };
    if (this.#busyId) this.#next = frame;
    else this.#send(frame);
    this.#changed();
  }

  /** @param {Frame} frame */
  #send(frame) {
    if (this.#stage.send(frame)) this.#busyId = frame.id;
    else this.#fail({ key: "errLost" });
  }

  #release() {
    this.#busyId = "";
    const next = this.#next;
    this.#next = undefined;
    if (next) this.#send(next);
  }

  /**
   * @param {AnswerTurn} turn
   * @param {number} n its place
   */
  #append(turn, n) {
    const { copy, focus, list } = this.#stage;
    const handlers = { retry: () => this.retry(), copy, focus };
    const view = new AnswerView(turn, shotFor(this.turns, n), handlers);
    this.#last?.markLast(false);
    view.markLast(true);
    this.#last = view;
    list.append(view.element);
    return view;
  }

  /** @param {Failure} failure */
  #fail(failure) {
    if (this.#running) this.#running.turn.failure = failure;
    this.#finish("failed");
  }

  /** @param {"done" | "stopped" | "failed"} status */
  #finish(status) {
    if (!this.#running) return;
    const { turn, view } = this.#running;
    this.#running = undefined;
    turn.status = status;
    view.update();
    this.#changed();
    this.#stage.onEnd(view, turn);
  }

  /** Tokens come faster than screens are drawn. */
  #showSoon() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#running?.view.update();
      this.#stage.onChange();
    });
  }

  #changed() {
    keepTurns(this.turns);
    this.#stage.onChange();
  }
}
