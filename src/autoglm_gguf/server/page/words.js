// An action in words: which text says it, and with which values.

import { pointsOf, toPixel } from "./draw.js";
import { text } from "./i18n.js";

/** @typedef {import("./state.js").Action} Action */
/** @typedef {import("./state.js").Shot} Shot */
/** @typedef {import("./i18n.js").Said} Said */

/** @type {Record<string, string>} */
const KEYS = {
  Launch: "doLaunch",
  Tap: "doTap",
  Type: "doType",
  Type_Name: "doTypeName",
  Interact: "doInteract",
  Swipe: "doSwipe",
  Note: "doNote",
  Call_API: "doCallApi",
  "Long Press": "doLongPress",
  "Double Tap": "doDoubleTap",
  Take_over: "doTakeOver",
  Back: "doBack",
  Home: "doHome",
  Wait: "doWait",
  finish: "doFinish",
};

/**
 * What is done.
 * @param {Action} action
 * @returns {Said}
 */
export function deed(action) {
  const given = action.arguments;
  const values = {
    app: String(given.app ?? ""),
    text: String(given.text ?? given.message ?? given.instruction ?? ""),
    seconds: String(given.duration ?? "").replace(/ seconds$/, ""),
  };
  return { key: KEYS[action.name] ?? "empty", values };
}

/**
 * Where it is done, in thousandths of the screen.
 * @param {Action} action
 * @returns {Said | undefined}
 */
export function place(action) {
  const { element, start, end } = pointsOf(action);
  if (element) return { key: "at", values: { x: element[0], y: element[1] } };
  if (!start || !end) return undefined;
  return { key: "fromTo", values: { x1: start[0], y1: start[1], x2: end[0], y2: end[1] } };
}

/**
 * The same in pixels of the screenshot.
 * @param {Action} action
 * @param {Shot} shot
 * @returns {Said | undefined}
 */
export function pixels(action, shot) {
  const { element, start, end } = pointsOf(action);
  const size = { width: shot.width, height: shot.height };
  if (element) return { key: "pixel", values: { ...toPixel(element, size), ...size } };
  if (!start || !end) return undefined;
  const [from, to] = [toPixel(start, size), toPixel(end, size)];
  return { key: "pixels", values: { x1: from.x, y1: from.y, x2: to.x, y2: to.y, ...size } };
}

/**
 * An action in one sentence of the current language.
 * @param {Action} action
 * @returns {string}
 */
export function sentence(action) {
  const { key, values } = deed(action);
  const where = place(action);
  const message = action.name === "finish" ? String(action.arguments.message ?? "") : "";
  const parts = [text(key, values), where ? text(where.key, where.values) : "", message];
  return parts.filter((part) => part !== "").join(". ");
}
