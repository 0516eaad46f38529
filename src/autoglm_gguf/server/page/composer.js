// The message being written: its text, its screenshot, and what is wrong with it.

import { find, icon, make } from "./dom.js";
import { showBytes } from "./format.js";
import { say } from "./i18n.js";
import { filesOf, ImageFault, readShot } from "./images.js";
import { picture } from "./render.js";
import { recall, remember } from "./store.js";

/** @typedef {import("./images.js").Limits} Limits */
/** @typedef {import("./state.js").Shot} Shot */

/**
 * @typedef {object} Desk
 * @property {(text: string, shot: Shot | undefined, agent: boolean) => boolean} send
 *   false: not taken, the message stays
 * @property {() => void} stop
 * @property {() => Limits & {takes_images: boolean}} limits
 */

export class Composer {
  #desk;
  #form = find("composer", HTMLFormElement);
  #input = find("input", HTMLTextAreaElement);
  #file = find("file", HTMLInputElement);
  #agent = find("agent", HTMLInputElement);
  #tray = find("tray", HTMLDivElement);
  #note = find("note", HTMLParagraphElement);
  #send = find("send", HTMLButtonElement);
  #stop = find("stop", HTMLButtonElement);
  #drop = find("drop", HTMLDivElement);
  /** @type {Shot | undefined} */
  #shot;

  /** @param {Desk} desk */
  constructor(desk) {
    this.#desk = desk;
    this.#agent.checked = recall("agent") !== "off";
    this.#agent.addEventListener("change", () => {
      remember("agent", this.#agent.checked ? "on" : "off");
    });
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#input.addEventListener("keydown", (event) => this.#key(event));
    this.#input.addEventListener("input", () => {
      this.#fit();
      this.note("");
    });
    this.#stop.addEventListener("click", () => desk.stop());
    find("attach", HTMLButtonElement).addEventListener("click", () => this.#file.click());
    this.#file.addEventListener("change", () => {
      this.#take(Array.from(this.#file.files ?? []));
      this.#file.value = ""; // the same file may be chosen again
    });
    this.#listen();
  }

  /**
   * Begin a message.
   * @param {string} text
   */
  fill(text) {
    this.#input.value = text;
    this.#fit();
    this.focus();
  }

  focus() {
    this.#input.focus({ preventScroll: true });
  }

  /** @param {boolean} running an answer is being made, and can be stopped */
  showRunning(running) {
    const focused = [this.#send, this.#stop].includes(/** @type {any} */ (document.activeElement));
    this.#send.hidden = running;
    this.#stop.hidden = !running;
    if (focused) this.focus(); // a hidden button would lose it
  }

  /**
   * Say what is wrong, or nothing.
   * @param {string} key
   * @param {import("./i18n.js").Values} [values]
   */
  note(key, values = {}) {
    this.#note.hidden = key === "";
    if (key) say(this.#note, key, values);
  }

  #submit() {
    const text = this.#input.value.trim();
    if (text === "") {
      this.note("errNoText");
      this.focus();
      return;
    }
    if (!this.#desk.send(text, this.#shot, this.#agent.checked)) return;
    this.#input.value = "";
    this.#attach(undefined);
    this.note("");
    this.#fit();
    this.focus();
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    // While a Chinese word is being composed, Enter belongs to the input method.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.#submit();
  }

  /** As high as its text, within the limits of the style sheet. */
  #fit() {
    this.#input.style.height = "auto";
    this.#input.style.height = `${this.#input.scrollHeight}px`;
  }

  /** A screenshot may be dropped anywhere, and pasted anywhere. */
  #listen() {
    let depth = 0; // dragenter and dragleave come for every element that is crossed
    const carries = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragenter", (event) => {
      if (!carries(event)) return;
      depth += 1;
      this.#drop.hidden = false;
    });
    addEventListener("dragleave", (event) => {
      if (!carries(event)) return;
      depth -= 1;
      this.#drop.hidden = depth > 0 ? this.#drop.hidden : true;
    });
    addEventListener("dragover", (event) => carries(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      depth = 0;
      this.#drop.hidden = true;
      if (!carries(event)) return;
      event.preventDefault();
      this.#take(filesOf(event.dataTransfer));
    });
    addEventListener("paste", (event) => {
      const files = filesOf(event.clipboardData);
      // Office programs put a picture of the text beside the text: then the text is meant.
      if (files.length === 0 || event.clipboardData?.types.includes("text/plain")) return;
      event.preventDefault();
      this.#take(files);
    });
  }

  /** @param {File[]} files */
  async #take(files) {
    const [file] = files;
    if (!file) return;
    const limits = this.#desk.limits();
    if (!limits.takes_images) {
      this.note("errTextOnly");
      return;
    }
    try {
      this.#attach(await readShot(file, limits, showBytes));
      if (files.length > 1) this.note("errMany");
      else this.note("");
    } catch (fault) {
      if (!(fault instanceof ImageFault)) throw fault;
      this.note(fault.key, fault.values);
    }
    this.focus();
  }

  /** @param {Shot | undefined} shot */
  #attach(shot) {
    this.#shot = shot;
    this.#tray.hidden = shot === undefined;
    if (!shot) {
      this.#tray.replaceChildren();
      return;
    }
    const remove = make("button", { type: "button", class: "round small" }, icon("close"));
    say(remove, "removeShot", {}, "aria-label");
    say(remove, "removeShot", {}, "title");
    remove.addEventListener("click", () => {
      this.#attach(undefined);
      this.focus();
    });
    const size = `${shot.width} × ${shot.height}`;
    const words = make("span", { class: "name" }, shot.name, make("small", {}, size));
    this.#tray.replaceChildren(picture(shot), words, remove);
  }
}
