// The conversation, and what the server is asked with it. Knows no DOM and no connection.

/**
 * @typedef {object} Shot
 * A screenshot as it is sent.
 * @property {string} url a data: URL
 * @property {string} name of its file
 * @property {number} width in pixels
 * @property {number} height in pixels
 *
 * @typedef {object} UserTurn
 * @property {"user"} role
 * @property {string} text
 * @property {Shot} [shot]
 *
 * @typedef {object} Action
 * As the server read it out of the answer.
 * @property {string} name as in do(action="…"), or finish
 * @property {Record<string, string | [number, number]>} arguments points are 0 to 999
 * @property {string} text of the call
 * @property {string} thinking what stands before it
 *
 * @typedef {object} Failure
 * @property {string} key of the text that says what went wrong and what to do
 * @property {string} [detail] what the server said
 *
 * @typedef {object} Ending
 * The last frame of an answer.
 * @property {string} finish_reason
 * @property {any} [usage]
 * @property {any} [timings]
 * @property {any} [route]
 * @property {Action} [action]
 *
 * @typedef {object} AnswerTurn
 * @property {"assistant"} role
 * @property {string} text what the model wrote so far
 * @property {boolean} agent it was asked for an action
 * @property {"running" | "done" | "stopped" | "failed"} status
 * @property {number} [ahead] requests before it in the queue
 * @property {Ending} [ending]
 * @property {Failure} [failure]
 *
 * @typedef {UserTurn | AnswerTurn} Turn
 *
 * @typedef {{type: "text", text: string} | {type: "image_url", image_url: {url: string}}} Part
 * @typedef {{role: string, content: string | Part[]}} Message
 */

const END = "</answer>";

/**
 * @param {boolean} agent
 * @returns {AnswerTurn} an answer that has not begun.
 */
export function newAnswer(agent) {
  return { role: "assistant", text: "", agent, status: "running" };
}

/**
 * The messages that ask for the answer to the last user turn. As the phone agent does it, only the
 * newest screenshot is sent, in the turn it came with: each costs hundreds of tokens.
 * @param {Turn[]} turns the last one is a user's
 * @param {boolean} agent ask for an action
 * @param {{zh: string, en: string}} prompts that describe the actions
 * @returns {Message[]}
 */
export function toMessages(turns, agent, prompts) {
  const told = withoutFailed(turns);
  const shown = told.findLastIndex((turn) => turn.role === "user" && turn.shot);
  /** @type {Message[]} */
  const messages = told.map((turn, n) => {
    if (turn.role === "assistant") return { role: "assistant", content: closed(turn.text) };
    if (n !== shown || !turn.shot) return { role: "user", content: turn.text };
    /** @type {Part[]} */
    const parts = [
      { type: "image_url", image_url: { url: turn.shot.url } },
      { type: "text", text: turn.text },
    ];
    return { role: "user", content: parts };
  });
  if (!agent) return messages;
  const first = told.find((turn) => turn.role === "user")?.text ?? "";
  const prompt = /[\u4e00-\u9fff]/.test(first) ? prompts.zh : prompts.en;
  return [{ role: "system", content: prompt }, ...messages];
}

/**
 * Without the questions that got no word of an answer.
 * @param {Turn[]} turns
 * @returns {Turn[]}
 */
function withoutFailed(turns) {
  return turns.filter((turn, n) => {
    const next = turns[n + 1];
    if (turn.role === "assistant") return turn.text !== "";
    return next === undefined || next.role !== "assistant" || next.text !== "";
  });
}

/**
 * The tag that ends a turn is taken from an answer; in the history it stands.
 * @param {string} text
 */
function closed(text) {
  return text.includes("<answer>") && !text.includes(END) ? text + END : text;
}

/**
 * Thinking and answer of a text, by the tags alone. Actions are read by the server.
 * @param {string} text
 * @param {boolean} running it is still being written: half a tag at its end is left out
 * @returns {{thinking: string, answer: string}}
 */
export function split(text, running) {
  const ended = running ? text.replace(/<\/?[a-z]*$/, "") : text;
  const whole = ended.replace(/<\/answer>[^]*$/, "");
  const at = whole.search(/<\/think>|<answer>/);
  if (at < 0) {
    const opened = /^\s*<think>/.exec(whole);
    return opened
      ? { thinking: whole.slice(opened[0].length).trim(), answer: "" }
      : { thinking: "", answer: whole.trim() };
  }
  const thinking = whole.slice(0, at).replace(/^\s*<think>/, "");
  const answer = whole.slice(at).replace(/^(?:<\/think>|<answer>|\s)+/, "");
  return { thinking: thinking.trim(), answer: answer.trim() };
}

/**
 * The action of an answer that is to be shown as one. A chat that only mentions a call is text.
 * @param {AnswerTurn} turn
 * @returns {Action | undefined}
 */
export function actionOf(turn) {
  const meant = turn.agent || turn.text.includes("<answer>") || /^\s*(do|finish)\(/.test(turn.text);
  return meant ? turn.ending?.action : undefined;
}

/**
 * The screenshot that an answer speaks of: the newest one before it.
 * @param {Turn[]} turns
 * @param {number} n the answer's place among them
 * @returns {Shot | undefined}
 */
export function shotFor(turns, n) {
  for (const turn of turns.slice(0, n).reverse()) {
    if (turn.role === "user" && turn.shot) return turn.shot;
  }
  return undefined;
}

/**
 * A kept conversation, if that is what it is. An answer that was being made has ended with the page.
 * @param {unknown} kept
 * @returns {Turn[]}
 */
export function restore(kept) {
  if (!Array.isArray(kept)) return [];
  const turns = /** @type {Turn[]} */ (
    kept.filter((t) => t && typeof t.text === "string" && /^(user|assistant)$/.test(t.role))
  );
  for (const turn of turns) {
    if (turn.role === "assistant" && turn.status === "running") turn.status = "stopped";
  }
  return turns;
}
