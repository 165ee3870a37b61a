// The form that begins a world: a picture, a sentence, and details.

const $ = (id) => document.getElementById(id);

export class Begin {
  constructor({ stage, onStart }) {
    this.form = $("begin");
    this.file = null;
    this.limits = {};
    this.busy = false;
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit(onStart);
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    $("upload").addEventListener("change", (event) => this.take(event.target.files[0]));
    $("back").addEventListener("click", () => this.hide());
    for (const name of ["dragenter", "dragover"]) {
      stage.addEventListener(name, (event) => {
        event.preventDefault();
        stage.classList.add("over");
      });
    }
    for (const name of ["dragleave", "drop"]) stage.addEventListener(name, () => stage.classList.remove("over"));
    stage.addEventListener("drop", (event) => {
      event.preventDefault();
      this.show(true);
      this.take(event.dataTransfer.files[0]);
    });
    addEventListener("paste", (event) => this.shown && this.take([...(event.clipboardData?.files ?? [])][0]));
  }

  get shown() {
    return !this.form.hidden;
  }

  show(canGoBack) {
    this.form.hidden = false;
    $("back").hidden = !canGoBack;
    this.fault("");
    this.#backdrop();
    (this.form.querySelector("input:checked") ?? $("prompt")).focus({ preventScroll: true });
  }

  // Before the first world the chosen picture, out of focus, stands where it will be.
  #backdrop() {
    const picture = this.form.querySelector(".tile:has(:checked) img, .tile.chosen img");
    if (picture) $("backdrop").src = picture.src;
    $("backdrop").hidden = !picture || !$("back").hidden;
  }

  hide() {
    this.form.hidden = true;
    $("backdrop").hidden = true;
    $("screen").focus({ preventScroll: true });
  }

  fault(words) {
    $("fault").textContent = words;
    this.wait(false);
  }

  wait(on) {
    this.busy = on;
    $("go").disabled = on;
    $("go").textContent = on ? "Beginning…" : "Begin";
  }

  describe({ samples, schemes, scheme, limits }) {
    this.limits = limits;
    this.prompts = Object.fromEntries(samples.map(({ name, prompt }) => [name, prompt]));
    const chosen = this.form.querySelector("input:checked")?.value ?? samples[0]?.name;
    $("pictures").replaceChildren(...samples.map(({ name }) => tile(name)));
    for (const input of $("pictures").querySelectorAll("input")) {
      input.addEventListener("change", () => (this.#forget(), this.#suggest(input.value)));
      if (!this.file) input.checked = input.value === chosen;
    }
    if (!this.file) this.#suggest(chosen);
    if ($("scheme").childElementCount) return;
    for (const name of Object.keys(schemes)) $("scheme").add(new Option(name, name, name === scheme, name === scheme));
  }

  take(file) {
    if (!file) return;
    if (this.limits.image_bytes && file.size > this.limits.image_bytes) {
      this.fault(`The picture has ${(file.size / 1e6).toFixed(1)} MB; ${(this.limits.image_bytes / 1e6).toFixed(0)} MB are allowed.`);
      return;
    }
    this.fault("");
    this.#forget();
    this.file = file;
    const picture = document.createElement("img");
    picture.src = URL.createObjectURL(file);
    picture.alt = "";
    picture.onerror = () => picture.remove();
    $("upload-tile").prepend(picture);
    $("upload-tile").classList.add("chosen");
    $("upload-text").textContent = file.name || "pasted picture";
    for (const input of $("pictures").querySelectorAll("input")) input.checked = false;
    this.#suggest(null);
  }

  // A sample's own sentence stands in for one that is not written.
  #suggest(name) {
    const { dataset } = $("prompt");
    dataset.example ??= $("prompt").placeholder;
    $("prompt").placeholder = this.prompts[name] || dataset.example;
    if (this.shown) this.#backdrop();
  }

  #forget() {
    this.file = null;
    const picture = $("upload-tile").querySelector("img");
    if (picture) {
      URL.revokeObjectURL(picture.src);
      picture.remove();
    }
    $("upload").value = "";
    $("upload-tile").classList.remove("chosen");
    $("upload-text").textContent = "Drop a picture, or choose one";
  }

  async #submit(onStart) {
    if (this.busy) return;
    const sample = this.form.querySelector("#pictures input:checked")?.value;
    if (!this.file && !sample) return this.fault("Choose a first frame.");
    const seed = Number($("seed").value || 42), fov = $("fov").value ? Number($("fov").value) : null;
    if (!Number.isSafeInteger(seed) || seed < 0) return this.fault("The seed is a whole number from 0 up.");
    const request = {
      prompt: $("prompt").value.trim() || $("prompt").placeholder,
      image: this.file ? "upload" : sample,
      seed,
      fov,
      scheme: $("scheme").value || null,
      full: $("policy").value,
      at_end: $("at-end").value,
    };
    this.fault("");
    this.wait(true);
    onStart(request, this.file ? await this.file.arrayBuffer() : null);
  }
}

function tile(name) {
  const label = document.createElement("label");
  label.className = "tile";
  const input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "picture", value: name });
  const picture = document.createElement("img");
  Object.assign(picture, { src: `samples/${encodeURIComponent(name)}`, alt: "" });
  const words = document.createElement("span");
  words.textContent = name.replaceAll("_", " ");
  label.append(input, picture, words);
  return label;
}
