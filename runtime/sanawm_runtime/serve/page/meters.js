// The figures, and the time of the last chunks by stage under the line of real time.

import { fresh } from "./draw.js";

const STAGES = { waited: "#4b545b", camera: "#6fa58d", denoise: "#5d89b3", commit: "#93b7d3", decode: "#e3c08a", encode: "#8d8577" };
const MOST = 36;

export class Meters {
  constructor({ bars, legend, fps, latency, queue, reaction }) {
    this.bars = bars;
    this.legend = legend;
    this.out = { fps, latency, queue, reaction };
    this.clear();
    addEventListener("resize", () => this.draw());
  }

  clear() {
    this.chunks = [];
    for (const element of Object.values(this.out)) element.textContent = "–";
    this.legend.replaceChildren();
    this.draw();
  }

  show(name, value, unit) {
    const small = document.createElement("span");
    small.textContent = unit;
    this.out[name].replaceChildren(value, small);
  }

  push(chunk, fps) {
    const seconds = { waited: chunk.waited_s, ...chunk.seconds, encode: chunk.encode_s };
    const total = Object.values(seconds).reduce((sum, value) => sum + value, 0);
    this.chunks.push({ seconds, plays: chunk.frames / fps });
    if (this.chunks.length > MOST) this.chunks.shift();
    this.show("latency", total < 10 ? total.toFixed(2) : total.toFixed(1), "s");
    if (!this.legend.childElementCount) this.#names(seconds);
    this.draw();
  }

  #names(seconds) {
    for (const name of Object.keys(seconds)) {
      const item = document.createElement("span");
      const mark = document.createElement("i");
      mark.style.background = STAGES[name] ?? "#70767a";
      item.append(mark, name);
      this.legend.append(item);
    }
  }

  draw() {
    const { context: c, width, height } = fresh(this.bars);
    if (!width || !this.chunks.length) return;
    const totals = this.chunks.map((chunk) => Object.values(chunk.seconds).reduce((sum, value) => sum + value, 0));
    const plays = this.chunks.at(-1).plays;
    const top = 1.12 * Math.max(plays, ...totals);
    const step = width / MOST, floor = height - 1;
    this.chunks.forEach((chunk, index) => {
      const x = width - (this.chunks.length - index) * step;
      let y = floor;
      for (const [name, value] of Object.entries(chunk.seconds)) {
        const tall = (value / top) * (height - 4);
        c.fillStyle = STAGES[name] ?? "#70767a";
        c.fillRect(x + 0.75, y - tall, step - 1.5, tall);
        y -= tall;
      }
    });
    const line = floor - (plays / top) * (height - 4);
    c.strokeStyle = "rgb(236 234 229 / 50%)";
    c.setLineDash([3, 4]);
    c.beginPath();
    c.moveTo(0, line);
    c.lineTo(width, line);
    c.stroke();
    c.setLineDash([]);
    c.font = "10px Inter, system-ui, sans-serif";
    c.fillStyle = "#a8adb0";
    c.fillText("real time", 0, line > 16 ? line - 5 : line + 13);
  }
}
