// The dialog that asks for the API key. What is typed goes to `use` and nowhere else.

import { find } from "./dom.js";
import { say } from "./i18n.js";

/** What fits into a header: visible ASCII, without spaces. */
const SHAPE = /^[\x21-\x7e]{1,512}$/;

export class KeyDialog {
  #dialog = find("key-dialog", HTMLDialogElement);
  #input = find("key", HTMLInputElement);
  #fault = find("key-fault", HTMLParagraphElement);

  /** @param {(key: string) => void} use */
  constructor(use) {
    find("key-form", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      const key = this.#input.value.trim();
      if (!SHAPE.test(key)) {
        this.#refuse(key === "" ? "keyEmpty" : "keyShape");
        return;
      }
      this.#dialog.close();
      use(key);
    });
    find("key-cancel", HTMLButtonElement).addEventListener("click", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => (this.#input.value = ""));
  }

  /** @param {boolean} wrong there was one, and it is not the server's */
  ask(wrong) {
    this.#fault.hidden = true;
    this.#input.removeAttribute("aria-invalid");
    if (!this.#dialog.open) this.#dialog.showModal();
    if (wrong) this.#refuse("keyWrong");
    this.#input.focus();
  }

  /** @param {string} key of the text */
  #refuse(key) {
    this.#fault.hidden = false;
    this.#input.setAttribute("aria-invalid", "true");
    say(this.#fault, key);
    this.#input.focus();
    this.#input.select();
  }
}
