// Beside the conversation: memory planned, measured and allowed; the last answer's speed; the model.

import { find, make } from "./dom.js";
import { showBytes, showCount, showRate, showTime } from "./format.js";
import { say } from "./i18n.js";

/**
 * @typedef {object} Memory
 * @property {number | null} budget_bytes
 * @property {number | null} planned_bytes
 * @property {{total_bytes: number} | null} measured
 *
 * @typedef {object} Status
 * What /status tells.
 * @property {"loading" | "ready" | "failed" | "stopping"} status
 * @property {string | null} model
 * @property {number | null} n_ctx
 * @property {boolean} takes_images
 * @property {number | null} max_image_tokens
 * @property {string[]} notes
 * @property {Memory} memory
 * @property {import("./images.js").Limits} limits
 * @property {{zh: string, en: string}} system_prompts
 */

/** @param {Status} status to show */
export function showStatus(status) {
  find("model-name", HTMLElement).textContent = status.model ?? "";
  showMemory(status.memory);
  showModel(status);
}

/** @param {Memory} memory */
function showMemory({ budget_bytes: budget, planned_bytes: planned, measured }) {
  const held = measured?.total_bytes ?? 0;
  const whole = budget ?? 1.15 * Math.max(held, planned ?? 0, 1);
  const gauge = find("gauge", HTMLElement);
  const share = (/** @type {number} */ bytes) => `${Math.min(100, (100 * bytes) / whole)}%`;
  gauge.style.setProperty("--held", share(held));
  gauge.style.setProperty("--planned", share(planned ?? 0));
  gauge.classList.toggle("over", budget !== null && held > budget);
  gauge.classList.toggle("unplanned", planned === null);
  gauge.setAttribute("aria-valuenow", String(held));
  gauge.setAttribute("aria-valuemax", String(Math.max(whole, held)));
  const values = {
    measured: measured ? showBytes(held) : "–",
    planned: planned === null ? "–" : showBytes(planned),
    budget: budget === null ? "–" : showBytes(budget),
  };
  say(gauge, "gaugeText", values, "aria-valuetext");
  put("measured", measured && showBytes(held), "unknown");
  put("planned", planned === null ? null : showBytes(planned), "unknown");
  put("budget", budget === null ? null : showBytes(budget), "noBudget");
  find("memory-short", HTMLElement).textContent = measured ? showBytes(held) : "";
}

/** @param {Status} status */
function showModel({ model, n_ctx, max_image_tokens, takes_images, notes }) {
  put("about-name", model, "unknown");
  const count = (/** @type {number | null} */ n) => ({ n: n === null ? "–" : showCount(n) });
  say(find("about-context", HTMLElement), "tokens", count(n_ctx));
  say(find("about-image", HTMLElement), "tokens", count(max_image_tokens));
  const row = find("about-image-row", HTMLElement);
  row.hidden = !takes_images || !max_image_tokens;
  find("text-only", HTMLElement).hidden = takes_images || model === null;
  const list = find("notes", HTMLElement);
  const items = notes.map((note) => make("li", {}, note));
  if (list.childElementCount !== items.length) list.replaceChildren(...items);
  find("notes-fold", HTMLElement).hidden = notes.length === 0;
}

/**
 * @param {import("./state.js").Ending | undefined} ending of the last answer
 */
export function showSpeed(ending) {
  const { timings, usage } = ending ?? {};
  const card = find("speed", HTMLElement);
  card.hidden = !timings || !usage;
  if (!timings || !usage) return;
  const details = usage.prompt_tokens_details;
  const numbers = {
    rate: timings.predicted_n > 0 ? showRate(timings.predicted_per_second) : "–",
    first: showTime(timings.ttft_ms),
    prompt: showCount(usage.prompt_tokens),
    "prompt-image": showCount(details.image_tokens ?? 0),
    "prompt-cache": showCount(details.cached_tokens),
    completion: showCount(usage.completion_tokens),
  };
  for (const [id, shown] of Object.entries(numbers)) {
    find(`speed-${id}`, HTMLElement).textContent = shown;
  }
}

/**
 * @param {string} id
 * @param {string | null} shown
 * @param {string} otherwise key of what is said where there is no number
 */
function put(id, shown, otherwise) {
  const element = find(id, HTMLElement);
  if (shown === null) say(element, otherwise);
  else say(element, "asIs", { text: shown });
}
