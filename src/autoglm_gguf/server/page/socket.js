// The connection to /ws/generate: opened, kept, opened again. Frames are JSON, as the server's
// websocket.py describes them. The key is held here, in memory only.

/**
 * @typedef {"connecting" | "ready" | "key" | "wrong-key" | "lost"} LinkState
 * @typedef {{type: string, [field: string]: any}} Frame
 * @typedef {object} Listener
 * @property {(state: LinkState, retryMs: number) => void} onState retryMs: when it tries again
 * @property {(frame: Frame) => void} onFrame
 */

const FIRST_RETRY_MS = 500;
const LONGEST_RETRY_MS = 8000;
const PING_MS = 15000;
/** No frame for so long, though pings were sent: the way is dead, as after a computer's sleep. */
const SILENCE_MS = 45000;

export class Connection {
  #listener;
  /** @type {WebSocket | undefined} */
  #socket;
  #key = "";
  /** @type {LinkState} */
  #state = "connecting";
  #retryMs = FIRST_RETRY_MS;
  #heardAt = 0;
  /** @type {number | undefined} */
  #retrying;

  /** @param {Listener} listener */
  constructor(listener) {
    this.#listener = listener;
    setInterval(() => this.#keepAlive(), PING_MS);
    addEventListener("online", () => this.retry());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.retry();
    });
  }

  /** Frames can be sent. */
  get isReady() {
    return this.#state === "ready";
  }

  /**
   * Headers for requests beside the connection.
   * @returns {Record<string, string>}
   */
  get headers() {
    return this.#key ? { Authorization: `Bearer ${this.#key}` } : {};
  }

  /** Open it. */
  open() {
    clearTimeout(this.#retrying);
    this.#drop();
    this.#tell("connecting");
    const url = new URL("ws/generate", location.href); // below the page, wherever a proxy put it
    url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url);
    this.#socket = socket;
    socket.onopen = () => {
      this.#heardAt = Date.now();
      // A server with a key wants it first, and refuses anything else; one without takes a ping.
      this.#write(this.#key ? { type: "auth", api_key: this.#key } : { type: "ping" });
    };
    socket.onmessage = (event) => this.#hear(JSON.parse(event.data));
    socket.onclose = () => this.#lose();
  }

  /** Try at once, if it is waiting to. */
  retry() {
    if (this.#state === "lost") this.open();
  }

  /**
   * Use a key from now on.
   * @param {string} key
   */
  useKey(key) {
    this.#key = key;
    this.open();
  }

  /** The key is not, or no longer, the right one: nothing is tried until there is another. */
  refuseKey() {
    this.#drop();
    this.#tell(this.#key ? "wrong-key" : "key");
    this.#key = "";
  }

  /**
   * @param {Frame} frame
   * @returns {boolean} whether it was sent.
   */
  send(frame) {
    return this.isReady && this.#write(frame);
  }

  /** @param {Frame} frame */
  #write(frame) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(JSON.stringify(frame));
    return true;
  }

  /** @param {Frame} frame */
  #hear(frame) {
    this.#heardAt = Date.now();
    if (frame.type === "error" && frame.error.code === "invalid_api_key") {
      this.refuseKey();
      return;
    }
    if (frame.type === "ready") {
      this.#retryMs = FIRST_RETRY_MS;
      this.#tell("ready");
    }
    if (frame.type !== "pong") this.#listener.onFrame(frame);
  }

  #lose() {
    this.#drop();
    this.#tell("lost", this.#retryMs);
    this.#retrying = setTimeout(() => this.open(), this.#retryMs);
    this.#retryMs = Math.min(2 * this.#retryMs, LONGEST_RETRY_MS);
  }

  #keepAlive() {
    if (!this.isReady) return;
    if (Date.now() - this.#heardAt > SILENCE_MS) this.#lose();
    else this.#write({ type: "ping" });
  }

  #drop() {
    const socket = this.#socket;
    this.#socket = undefined;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }

  /**
   * @param {LinkState} state
   * @param {number} [retryMs]
   */
  #tell(state, retryMs = 0) {
    this.#state = state;
    this.#listener.onState(state, retryMs);
  }
}
