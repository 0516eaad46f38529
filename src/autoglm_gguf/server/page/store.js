// What the browser keeps: choices for good, the conversation for this tab. Never a key.
// A browser may refuse to keep anything; then nothing is kept.

/**
 * @param {string} name
 * @returns {string | null} a choice made before.
 */
export function recall(name) {
  try {
    return localStorage.getItem(`autoglm.${name}`);
  } catch {
    return null;
  }
}

/**
 * @param {string} name
 * @param {string} value a choice to keep.
 */
export function remember(name, value) {
  try {
    localStorage.setItem(`autoglm.${name}`, value);
  } catch {
    // it holds for this page then
  }
}

const TURNS = "autoglm.turns";

/**
 * Keep the conversation over a reload of this tab; without its images where they are too large.
 * @param {import("./state.js").Turn[]} turns
 */
export function keepTurns(turns) {
  const bare = turns.map((turn) => (turn.role === "user" ? { ...turn, shot: undefined } : turn));
  for (const kept of [turns, bare, []]) {
    try {
      sessionStorage.setItem(TURNS, JSON.stringify(kept));
      return;
    } catch {
      // over the browser's limit: the next is smaller
    }
  }
}

/** @returns {unknown} what `keepTurns` kept, or null. */
export function keptTurns() {
  try {
    return JSON.parse(sessionStorage.getItem(TURNS) ?? "null");
  } catch {
    return null;
  }
}
