// An action drawn over a screenshot, as the command line's --annotate draws it: a tap is a ring
// with a cross, a double tap two rings, a long press a filled ring, a swipe an arrow. The drawing
// has the image's own pixels as its units, so that it fits at every size it is shown in.

import { makeSvg } from "./dom.js";

/** @typedef {import("./state.js").Action} Action */
/** @typedef {{x: number, y: number}} Place */
/** @typedef {{width: number, height: number}} Size */

/**
 * The middle of the thousandth that a point names, in pixels of the image.
 * @param {[number, number]} point 0 to 999 each
 * @param {Size} size of the image
 * @returns {Place}
 */
export function toPlace([x, y], { width, height }) {
  return { x: ((x + 0.5) * width) / 1000, y: ((y + 0.5) * height) / 1000 };
}

/**
 * The pixel that a point names, as the phone's client computes it.
 * @param {[number, number]} point
 * @param {Size} size
 * @returns {Place}
 */
export function toPixel([x, y], { width, height }) {
  return { x: Math.floor((x * width) / 1000), y: Math.floor((y * height) / 1000) };
}

/**
 * The points of an action by their names: element, or start and end.
 * @param {Action} action
 * @returns {Record<string, [number, number]>}
 */
export function pointsOf(action) {
  /** @type {Record<string, [number, number]>} */
  const points = {};
  for (const [name, value] of Object.entries(action.arguments)) {
    if (Array.isArray(value)) points[name] = value;
  }
  return points;
}

/**
 * What is laid over the screenshot.
 * @param {Action} action that touches something
 * @param {Size} size of the image
 * @returns {SVGSVGElement}
 */
export function draw(action, size) {
  const reach = Math.max(4, Math.min(size.width, size.height) / 18);
  const points = pointsOf(action);
  const marks = points.start && points.end
    ? arrow(toPlace(points.start, size), toPlace(points.end, size), reach)
    : Object.values(points).flatMap((point) => touch(action, toPlace(point, size), reach));
  const box = `0 0 ${size.width} ${size.height}`;
  return makeSvg("svg", { class: "marks", viewBox: box, "aria-hidden": "true" }, ...marks);
}

/**
 * @param {Action} action
 * @param {Place} place
 * @param {number} reach radius in pixels
 * @returns {SVGElement[]}
 */
function touch(action, place, reach) {
  const held = action.name === "Long Press";
  const rings = action.name === "Double Tap" ? [1, 1.7] : [1];
  const half = 0.45 * reach;
  const cross =
    `M${place.x - half} ${place.y}H${place.x + half}` +
    `M${place.x} ${place.y - half}V${place.y + half}`;
  return [
    circle(place, reach * 2.1, { class: "halo" }),
    ...rings.flatMap((times) =>
      ["edge", "ring"].map((part) => circle(place, reach * times, stroke(part, reach))),
    ),
    ...(held ? [circle(place, reach, { class: "fill" })] : []),
    ...["edge", "ring"].map((part) => makeSvg("path", { d: cross, ...stroke(part, reach) })),
  ];
}

/**
 * @param {Place} start
 * @param {Place} end
 * @param {number} reach
 * @returns {SVGElement[]}
 */
function arrow(start, end, reach) {
  const angle = Math.atan2(end.y - start.y, end.x - start.x);
  const wings = [-2.6, 2.6].map((turn) => ({
    x: end.x + 1.6 * reach * Math.cos(angle + turn),
    y: end.y + 1.6 * reach * Math.sin(angle + turn),
  }));
  const way =
    `M${start.x} ${start.y}L${end.x} ${end.y}` +
    wings.map((wing) => `M${wing.x} ${wing.y}L${end.x} ${end.y}`).join("");
  return [
    ...["edge", "ring"].flatMap((part) => [
      makeSvg("path", { d: way, ...stroke(part, reach) }),
      circle(start, reach / 2, stroke(part, reach)),
    ]),
  ];
}

/**
 * A light edge under each line keeps it seen on any ground.
 * @param {string} part "edge" or "ring"
 * @param {number} reach
 */
function stroke(part, reach) {
  return { class: part, "stroke-width": (part === "edge" ? 0.5 : 0.24) * reach };
}

/**
 * @param {Place} place
 * @param {number} radius
 * @param {Record<string, string | number>} attributes
 */
function circle(place, radius, attributes) {
  return makeSvg("circle", { cx: place.x, cy: place.y, r: radius, ...attributes });
}
