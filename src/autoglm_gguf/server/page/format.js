// Numbers as people read them. Sizes are decimal, as everywhere in this project: 1 GB is 10^9 bytes.

/**
 * @param {number} bytes
 * @returns {string} such as "3.94 GB", three digits.
 */
export function showBytes(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let n = 0;
  let value = bytes;
  while (value >= 999.5 && n < units.length - 1) {
    value /= 1000;
    n += 1;
  }
  return `${n === 0 ? value : value.toPrecision(3)} ${units[n]}`;
}

/**
 * @param {number} ms milliseconds
 * @returns {string} such as "0.31 s", "12 s" or "2 min 5 s".
 */
export function showTime(ms) {
  const seconds = ms / 1000;
  if (seconds < 9.95) return `${seconds.toFixed(seconds < 0.995 ? 2 : 1)} s`;
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/**
 * @param {number} ms milliseconds that have gone by so far
 * @returns {string} whole seconds of it.
 */
export function showElapsed(ms) {
  const seconds = Math.floor(ms / 1000);
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

/**
 * @param {number} rate tokens a second
 * @returns {string}
 */
export function showRate(rate) {
  return rate < 99.95 ? rate.toFixed(1) : rate.toFixed(0);
}

/**
 * @param {number} n
 * @returns {string} with its thousands set apart.
 */
export function showCount(n) {
  return String(n).replace(/\B(?=(\d{3})+$)/g, "\u2009");
}
