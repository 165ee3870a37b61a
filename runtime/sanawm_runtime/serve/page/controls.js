// Keys, buttons, dragging and the wheel: all of them hold letters down.

export const LETTERS = "wasdijkl";
const ARROWS = { ArrowUp: "w", ArrowDown: "s", ArrowLeft: "a", ArrowRight: "d" };
const DRAG = 14; // px before a drag means something
const WHEEL = 280; // ms that one notch of the wheel walks

export class Controls {
  constructor({ screen, ring, pads, onChange, onAct }) {
    this.sources = new Map(); // letter -> set of what holds it
    this.onChange = onChange;
    this.onAct = onAct;
    this.yaw = "ad";
    this.buttons = new Map([...pads.querySelectorAll(".key")].map((button) => [button.dataset.key, button]));
    this.held = "";
    addEventListener("keydown", (event) => this.#key(event, true));
    addEventListener("keyup", (event) => this.#key(event, false));
    addEventListener("blur", () => this.release());
    document.addEventListener("visibilitychange", () => document.hidden && this.release());
    for (const [letter, button] of this.buttons) this.#button(letter, button);
    this.#drag(screen, ring);
    screen.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
  }

  // What the letters mean: which pair turns, and so which strafes.
  describe({ yaw }) {
    this.yaw = yaw;
    const words = { w: "forward", s: "back", i: "look up", k: "look down" };
    const [turn, strafe] = yaw === "ad" ? ["ad", "jl"] : ["jl", "ad"];
    words[turn[0]] = "turn left";
    words[turn[1]] = "turn right";
    words[strafe[0]] = "step left";
    words[strafe[1]] = "step right";
    for (const [letter, button] of this.buttons) {
      button.querySelector("small").textContent = words[letter];
      button.setAttribute("aria-label", `${letter.toUpperCase()}, ${words[letter]}`);
    }
    return words;
  }

  release() {
    this.sources.clear();
    this.#changed();
  }

  set(letter, source, down) {
    const sources = this.sources.get(letter) ?? new Set();
    down ? sources.add(source) : sources.delete(source);
    sources.size ? this.sources.set(letter, sources) : this.sources.delete(letter);
    this.#changed();
  }

  #changed() {
    const held = [...LETTERS].filter((letter) => this.sources.has(letter)).join("");
    if (held === this.held) return;
    this.held = held;
    for (const [letter, button] of this.buttons) button.setAttribute("aria-pressed", String(held.includes(letter)));
    this.onChange(held);
  }

  #key(event, down) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest?.("input, textarea, select, dialog[open]");
    if (typing) return;
    // A focused button has its own use for these.
    if (event.target.closest?.("button, a, summary") && (event.key === " " || event.key === "Enter")) return;
    const letter = ARROWS[event.key] ?? event.key.toLowerCase();
    if (letter.length === 1 && LETTERS.includes(letter)) {
      this.set(letter, `key ${event.code}`, down);
      event.preventDefault();
    } else if (down && !event.repeat && this.onAct(event.key, event)) {
      event.preventDefault();
    }
  }

  #button(letter, button) {
    const hold = (down) => (event) => {
      if (down) button.setPointerCapture?.(event.pointerId);
      this.set(letter, `button ${letter}`, down);
    };
    button.addEventListener("pointerdown", hold(true));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) button.addEventListener(name, hold(false));
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    // With a keyboard a button is held as long as its key is.
    for (const [name, down] of [["keydown", true], ["keyup", false]]) {
      button.addEventListener(name, (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        event.stopPropagation();
        this.set(letter, `button ${letter}`, down);
      });
    }
    button.addEventListener("blur", () => this.set(letter, `button ${letter}`, false));
  }

  #drag(screen, ring) {
    let from = null;
    const aim = (event) => {
      const dx = event.clientX - from.x, dy = event.clientY - from.y;
      this.set(this.yaw[0], "drag", dx < -DRAG);
      this.set(this.yaw[1], "drag", dx > DRAG);
      this.set("i", "drag", dy < -DRAG);
      this.set("k", "drag", dy > DRAG);
      const far = Math.max(1, Math.hypot(dx, dy) / 44);
      ring.firstElementChild.style.transform = `translate(${dx / far}px, ${dy / far}px)`;
    };
    const end = () => {
      from = null;
      ring.hidden = true;
      for (const letter of [...this.yaw, "i", "k"]) this.set(letter, "drag", false);
    };
    screen.addEventListener("pointerdown", (event) => {
      screen.setPointerCapture(event.pointerId);
      screen.focus({ preventScroll: true });
      from = { x: event.clientX, y: event.clientY };
      const box = screen.getBoundingClientRect();
      ring.style.left = `${from.x - box.left}px`;
      ring.style.top = `${from.y - box.top}px`;
      ring.hidden = false;
      aim(event);
      event.preventDefault();
    });
    screen.addEventListener("pointermove", (event) => from && aim(event));
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) screen.addEventListener(name, end);
  }

  #wheel(event) {
    event.preventDefault();
    const letter = event.deltaY < 0 ? "w" : "s";
    this.set(letter, "wheel", true);
    clearTimeout(this.wheelTimer);
    this.wheelTimer = setTimeout(() => (this.set("w", "wheel", false), this.set("s", "wheel", false)), WHEEL);
  }
}
