// Decodes frames, plays them at a steady rate, and asks for the next chunk just in time.

import { JPEG } from "./link.js";

const LARGEST = 4; // times the frame's own pixels
const MEASURED = 2000; // ms over which frames a second are counted

export class Player {
  constructor(canvas, { onFrame, onWant }) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.onFrame = onFrame;
    this.onWant = onWant;
    this.fps = 16;
    this.clear();
    requestAnimationFrame((now) => this.#tick(now));
  }

  clear() {
    for (const frame of this.queue ?? []) frame.picture.close();
    this.queue = [];
    this.decoding = Promise.resolve();
    this.epoch = (this.epoch ?? 0) + 1;
    this.outstanding = 0;
    this.asked = [];
    this.turnaround = 0.6;
    this.arrived = 0;
    this.interval = 0;
    this.next = 0;
    this.shown = [];
    this.total = 0;
    this.playing = false;
  }

  start(fps, chunkFrames) {
    this.clear();
    this.fps = fps;
    this.chunkFrames = chunkFrames;
    this.playing = true;
  }

  // The connection broke: what was asked for will not come.
  forget() {
    this.outstanding = 0;
    this.asked = [];
  }

  push(frame) {
    const epoch = this.epoch;
    this.decoding = this.decoding.then(() => decode(frame)).then((picture) => {
      if (epoch !== this.epoch) return picture.close();
      this.queue.push({ ...frame, picture, body: null });
      if (frame.left === 0) this.#arrived();
    });
  }

  get buffered() {
    return this.queue.length;
  }

  get rate() {
    const since = performance.now() - MEASURED;
    this.shown = this.shown.filter((time) => time > since);
    return (this.shown.length * 1000) / MEASURED;
  }

  #arrived() {
    const now = performance.now();
    const asked = this.asked.shift();
    this.outstanding = Math.max(0, this.outstanding - 1);
    if (asked) this.turnaround += 0.35 * ((now - asked) / 1000 - this.turnaround);
    if (this.arrived) this.interval = (now - this.arrived) / 1000;
    this.arrived = now;
  }

  #ask(now) {
    if (!this.playing) return;
    const seconds = this.queue.length / this.fps;
    const chunk = (this.chunkFrames ?? 24) / this.fps;
    // An engine that keeps up is asked as late as possible, so that keys act soon; one that does not is kept busy.
    const lead = Math.min(4, Math.max(0.3, 1.25 * this.turnaround + 0.15));
    const most = this.turnaround > chunk ? 2 : 1;
    if (this.outstanding < most && seconds < lead && this.onWant()) {
      this.outstanding++;
      this.asked.push(now);
    }
  }

  #tick(now) {
    requestAnimationFrame((later) => this.#tick(later));
    this.#ask(now);
    if (!this.queue.length) return;
    if (now < this.next) return;
    // Spread what is there over the time until more comes, so that a slow engine gives slow motion and not a stutter.
    const expected = Math.max(0.08, (this.arrived - now) / 1000 + this.interval);
    const keeps = !this.interval || this.interval <= (this.chunkFrames ?? 24) / this.fps;
    const rate = keeps ? this.fps : Math.max(1, Math.min(this.fps, this.queue.length / expected));
    this.next = Math.max(this.next + 1000 / rate, now - 1000 / rate);
    const frame = this.queue.shift();
    this.#fit(frame);
    this.context.drawImage(frame.picture, 0, 0, this.canvas.width, this.canvas.height);
    frame.picture.close();
    this.shown.push(now);
    this.total++;
    this.onFrame(frame, now);
  }

  // The canvas has the pixels that the screen shows, because it enlarges better than the style sheet does.
  #fit(frame) {
    const shown = (this.canvas.clientWidth * devicePixelRatio) / frame.width;
    const scale = Math.min(LARGEST, Math.max(1, Math.ceil(2 * shown) / 2));
    const width = Math.round(scale * frame.width), height = Math.round(scale * frame.height);
    if (this.canvas.width === width && this.canvas.height === height) return;
    this.canvas.width = width;
    this.canvas.height = height;
    // A canvas forgets its settings with its size.
    this.context.imageSmoothingQuality = "high";
  }
}

function decode(frame) {
  if (frame.kind === JPEG) return createImageBitmap(new Blob([frame.body], { type: "image/jpeg" }));
  const pixels = new Uint8ClampedArray(4 * frame.width * frame.height).fill(255);
  for (let from = 0, to = 0; from < frame.body.length; from += 3, to += 4) pixels.set(frame.body.subarray(from, from + 3), to);
  return createImageBitmap(new ImageData(pixels, frame.width, frame.height));
}
