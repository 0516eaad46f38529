// Texts in the reader's language. An element that shows a text remembers its key, so that a switch
// of language reaches all of them at once.

import { STRINGS } from "./strings.js";
import { recall, remember } from "./store.js";

/** @typedef {"en" | "zh"} Language */
/** @typedef {Record<string, string | number>} Values */
/** @typedef {{key: string, values: Values}} Said */

const NAME = "language";
/** What an element shows, by the place it shows it in: "text" or an attribute's name.
 * @type {WeakMap<Element, Map<string, Said>>} */
const said = new WeakMap();

/** @type {Language} */
let language = chosen();

/** @returns {Language} */
function chosen() {
  const kept = recall(NAME);
  if (kept === "en" || kept === "zh") return kept;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** @returns {Language} the language that is shown now. */
export function currentLanguage() {
  return language;
}

/**
 * A text in the current language.
 * @param {string} key of STRINGS
 * @param {Values} [values] for its {names}
 * @returns {string}
 */
export function text(key, values = {}) {
  const strings = /** @type {Record<string, string>} */ (STRINGS[language]);
  const found = strings[key];
  if (found === undefined) throw new Error(`no text ${key}`);
  return found.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

/**
 * Show a text in an element, in whichever language is current from now on.
 * @param {Element} element
 * @param {string} key
 * @param {Values} [values]
 * @param {string} [place] "text", or an attribute such as "aria-label"
 */
export function say(element, key, values = {}, place = "text") {
  const places = said.get(element) ?? new Map();
  places.set(place, { key, values });
  said.set(element, places);
  element.setAttribute("data-said", "");
  put(element, place, text(key, values));
}

/**
 * Forget what an element was to show, before it shows something else.
 * @param {Element} element
 */
export function unsay(element) {
  said.get(element)?.delete("text");
}

/**
 * Switch the language of everything that is shown.
 * @param {Language} wanted
 */
export function setLanguage(wanted) {
  language = wanted;
  remember(NAME, wanted);
  showLanguage();
}

/** Read the texts that the HTML names, and show them. */
export function readPage() {
  for (const element of document.querySelectorAll("[data-text]")) {
    say(element, element.getAttribute("data-text") ?? "");
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    const key = element.getAttribute("data-label") ?? "";
    say(element, key, {}, "aria-label");
    if (element.matches("button, label")) say(element, key, {}, "title");
  }
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    say(element, element.getAttribute("data-placeholder") ?? "", {}, "placeholder");
  }
  showLanguage();
}

function showLanguage() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = text("title");
  for (const element of document.querySelectorAll("[data-said]")) {
    for (const [place, { key, values }] of said.get(element) ?? []) {
      put(element, place, text(key, values));
    }
  }
}

/**
 * @param {Element} element
 * @param {string} place
 * @param {string} words
 */
function put(element, place, words) {
  if (place !== "text") element.setAttribute(place, words);
  else if (element.textContent !== words) element.textContent = words;
}
