// The camera's path from above: x to the right, z (forward) up.

import { fresh, niceStep } from "./draw.js";

const MOST = 4000;
const OLD = [86, 98, 108], NEW = [227, 192, 138];

export class Path {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
    addEventListener("resize", () => this.draw());
  }

  clear() {
    this.points = [];
    this.heading = 0;
    this.fov = 70;
    this.view = null;
    this.draw();
  }

  // pose: 3 x 4 camera-to-world, row-major
  push(pose) {
    this.points.push([pose[3], pose[11], -pose[7]]);
    this.heading = Math.atan2(pose[2], pose[10]);
    if (this.points.length > MOST) this.points = this.points.filter((_, i) => i % 2 === 0 || i > MOST - 400);
  }

  get position() {
    return this.points.at(-1) ?? [0, 0, 0];
  }

  draw() {
    const { context: c, width, height } = fresh(this.canvas);
    if (!width) return;
    const view = this.#frame(width, height);
    const at = ([x, z]) => [width / 2 + (x - view.x) * view.scale, height / 2 - (z - view.z) * view.scale];
    this.#grid(c, width, height, view, at);
    if (!this.points.length) return;
    c.lineWidth = 2;
    c.lineCap = "round";
    const count = this.points.length;
    for (let i = 1; i < count; i++) {
      const share = (i / count) ** 2;
      c.strokeStyle = `rgb(${OLD.map((old, k) => Math.round(old + (NEW[k] - old) * share)).join(" ")})`;
      c.beginPath();
      c.moveTo(...at(this.points[i - 1]));
      c.lineTo(...at(this.points[i]));
      c.stroke();
    }
    const [sx, sy] = at(this.points[0]);
    c.strokeStyle = "#878d91";
    c.lineWidth = 1.5;
    c.beginPath();
    c.arc(sx, sy, 4, 0, 7);
    c.stroke();
    this.#camera(c, at(this.points.at(-1)));
  }

  #camera(c, [x, y]) {
    const half = (this.fov / 2) * (Math.PI / 180), reach = 46;
    const up = this.heading - Math.PI / 2;
    const glow = c.createRadialGradient(x, y, 0, x, y, reach);
    glow.addColorStop(0, "rgb(227 192 138 / 55%)");
    glow.addColorStop(1, "rgb(227 192 138 / 0%)");
    c.fillStyle = glow;
    c.beginPath();
    c.moveTo(x, y);
    c.arc(x, y, reach, up - half, up + half);
    c.fill();
    c.fillStyle = "#eceae5";
    c.beginPath();
    c.arc(x, y, 4.5, 0, 7);
    c.fill();
  }

  // The whole path fits; the frame moves smoothly.
  #frame(width, height) {
    const xs = this.points.map((p) => p[0]), zs = this.points.map((p) => p[1]);
    const bounds = (values) => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
    const [x0, x1] = xs.length ? bounds(xs) : [0, 0], [z0, z1] = zs.length ? bounds(zs) : [0, 0];
    const span = Math.max(x1 - x0, z1 - z0, 1.2);
    const wanted = { x: (x0 + x1) / 2, z: (z0 + z1) / 2, scale: (0.62 * Math.min(width, height)) / span };
    const old = this.view ?? wanted;
    const ease = (a, b) => a + 0.15 * (b - a);
    this.view = { x: ease(old.x, wanted.x), z: ease(old.z, wanted.z), scale: ease(old.scale, wanted.scale) };
    return this.view;
  }

  #grid(c, width, height, view, at) {
    const step = niceStep(48 / view.scale);
    c.lineWidth = 1;
    c.font = "10px Inter, system-ui, sans-serif";
    c.fillStyle = "#70767a";
    const line = (x0, y0, x1, y1, zero) => {
      c.strokeStyle = zero ? "rgb(255 255 255 / 14%)" : "rgb(255 255 255 / 5%)";
      c.beginPath();
      c.moveTo(x0, y0);
      c.lineTo(x1, y1);
      c.stroke();
    };
    const label = (value) => String(+value.toPrecision(4));
    const west = view.x - width / 2 / view.scale, south = view.z - height / 2 / view.scale;
    for (let x = Math.ceil(west / step) * step; x < west + width / view.scale; x += step) {
      const [px] = at([x, 0]);
      line(px, 0, px, height, Math.abs(x) < step / 2);
      if (px > 24 && px < width - 16) c.fillText(label(x), px + 4, height - 7);
    }
    for (let z = Math.ceil(south / step) * step; z < south + height / view.scale; z += step) {
      const [, py] = at([0, z]);
      line(0, py, width, py, Math.abs(z) < step / 2);
      if (py > 16 && py < height - 20) c.fillText(label(z), 7, py - 4);
    }
  }
}
