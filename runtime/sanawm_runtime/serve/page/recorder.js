// Pieces of an mp4 from the server, saved as a file when the recording ends.

export class Recorder {
  constructor(name) {
    this.name = name;
    this.on = false;
    this.pieces = [];
    this.bytes = 0;
  }

  begin() {
    this.on = true;
    this.pieces = [];
    this.bytes = 0;
    this.since = performance.now();
  }

  push(body) {
    if (!this.on) return;
    // A copy in the browser's blob store, not on the page's heap.
    this.pieces.push(new Blob([body]));
    this.bytes += body.length;
  }

  get words() {
    const seconds = Math.floor((performance.now() - this.since) / 1000);
    return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}, ${(this.bytes / 1e6).toFixed(1)} MB`;
  }

  // Ends the recording; returns the file, or null if nothing came.
  end() {
    this.on = false;
    const pieces = this.pieces;
    this.pieces = [];
    return pieces.length ? new Blob(pieces, { type: "video/mp4" }) : null;
  }

  save(file) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = `${this.name()}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    return link.download;
  }
}
