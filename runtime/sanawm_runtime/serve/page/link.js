// The WebSocket: hello, reconnecting with patience, and binary messages taken apart.

const HEADER_BYTES = 72;
export const JPEG = 1, RGB = 2, MP4 = 3;

// Close codes after which trying again by itself is pointless or rude.
const POLICY = 1008, BUSY = 1013;
const FIRST_WAIT = 500, LONGEST_WAIT = 8000;

export function parseBinary(buffer) {
  const view = new DataView(buffer);
  const size = view.getUint16(2, true);
  const pose = [];
  for (let i = 0; i < 12; i++) pose.push(view.getFloat32(24 + 4 * i, true));
  return {
    kind: view.getUint8(0),
    chunk: view.getUint32(4, true),
    frame: Number(view.getBigUint64(8, true)),
    width: view.getUint16(16, true),
    height: view.getUint16(18, true),
    left: view.getUint32(20, true),
    pose,
    body: new Uint8Array(buffer, Math.max(size, HEADER_BYTES)),
  };
}

function takeToken() {
  // The token comes in the address's fragment and leaves it, so that a shared or bookmarked address does not carry it.
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    sessionStorage.setItem("token", given);
    history.replaceState(null, "", location.pathname + location.search);
  }
  return sessionStorage.getItem("token") ?? "";
}

export class Link extends EventTarget {
  constructor() {
    super();
    this.wait = FIRST_WAIT;
    this.token = takeToken();
    this.open = false;
  }

  connect() {
    clearTimeout(this.timer);
    const address = new URL("ws", location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    address.hash = "";
    const socket = (this.socket = new WebSocket(address));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => socket.send(JSON.stringify({ type: "hello", protocol: 1, token: this.token }));
    socket.onmessage = (event) => this.#take(event.data);
    socket.onclose = (event) => this.#closed(socket, event);
  }

  send(type, fields = {}) {
    if (!this.open) return false;
    this.socket.send(JSON.stringify({ type, ...fields }));
    return true;
  }

  sendFile(buffer) {
    if (this.open) this.socket.send(buffer);
  }

  #take(data) {
    if (typeof data !== "string") {
      this.#tell("binary", parseBinary(data));
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "welcome") {
      this.open = true;
      this.wait = FIRST_WAIT;
    }
    this.#tell(message.type, message);
  }

  #closed(socket, event) {
    if (socket !== this.socket) return;
    this.open = false;
    const refused = event.code === POLICY || event.code === BUSY;
    this.#tell("lost", { code: event.code, reason: event.reason, refused, wait: this.wait });
    if (refused) return;
    this.timer = setTimeout(() => this.connect(), this.wait);
    this.wait = Math.min(2 * this.wait, LONGEST_WAIT);
  }

  #tell(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
