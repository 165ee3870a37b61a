// Wires the page: link, player, controls, instruments.

import { Begin } from "./begin.js";
import { Controls } from "./controls.js";
import { Link, MP4 } from "./link.js";
import { Path } from "./map.js";
import { Meters } from "./meters.js";
import { Player } from "./player.js";
import { Recorder } from "./recorder.js";

const $ = (id) => document.getElementById(id);
const stage = $("stage"), screen = $("screen");

const link = new Link();
const path = new Path($("map"));
const meters = new Meters({ bars: $("bars"), legend: $("legend"), fps: $("fps"), latency: $("latency"), queue: $("queue"), reaction: $("reaction") });
const recorder = new Recorder(() => `sanawm-${state.world?.name ?? "world"}-${new Date().toISOString().slice(0, 19).replaceAll(":", "")}`);
const player = new Player(screen, { onFrame: shown, onWant: () => !state.paused && link.send("more", { chunks: 1 }) });
const begin = new Begin({ stage, onStart: start });
const controls = new Controls({ screen, ring: $("ring"), pads: $("pads"), onChange: keysChanged, onAct: act });

const state = { world: null, session: null, request: null, paused: false, ended: false, chunk: null, served: 0, pressed: null, words: {} };
// For tests and the curious.
window.sanawm = { link, player, path, controls, recorder, state };

// ---- what the server says

link.addEventListener("welcome", ({ detail }) => {
  state.world = detail.world;
  state.chunkFrames = detail.chunk_frames;
  state.schemes = detail.schemes;
  const { name, width, height, fps } = detail.world;
  $("world").textContent = `${name} · ${width} × ${height} · ${fps} fps`;
  status("open", "Connected");
  stage.parentElement.style.setProperty("--aspect", width / height);
  begin.describe(detail);
  explain(detail.scheme);
  note("");
  state.rejoining = Boolean(state.session);
  if (state.session) link.send("rejoin", { session: state.session.id, key: state.session.key });
  else begin.show(false);
});

link.addEventListener("started", ({ detail }) => {
  const { session, key, rejoined } = detail;
  state.session = { id: session, key };
  state.rejoining = false;
  if (rejoined) {
    player.forget();
    link.send("keys", { held: controls.held });
    status("open", "Connected again");
  } else {
    fresh();
    begin.wait(false);
    begin.hide();
  }
  buttons(true);
});

link.addEventListener("chunk", ({ detail }) => {
  if (detail.chunk === 0) state.stale = false;
  if (state.stale) return;
  state.chunk = detail;
  state.served = detail.chunk;
  meters.push(detail, state.world.fps);
  $("live").dataset.mood = mood();
  $("live-text").textContent = words();
});

link.addEventListener("binary", ({ detail }) => {
  if (detail.kind === MP4) recorder.push(detail.body);
  else if (!state.stale) player.push(detail);
});

link.addEventListener("recording", ({ detail }) => {
  if (detail.on) recorder.begin();
  else saveRecording();
  press("record", detail.on);
});

link.addEventListener("ended", ({ detail }) => {
  state.ended = true;
  player.playing = false;
  note(sentence(detail.message || "The world has ended."), "From the start", restart);
});

link.addEventListener("error", ({ detail }) => {
  if (begin.shown) begin.fault(sentence(detail.message));
  else if (state.rejoining) gone(detail.message);
  else note(sentence(detail.message));
  state.rejoining = false;
});

link.addEventListener("lost", ({ detail }) => {
  if (recorder.on) {
    saveRecording();
    press("record", false);
  }
  player.forget();
  begin.wait(false);
  if (detail.refused) {
    status("refused", "Not connected");
    state.session = null;
    buttons(false);
    note(sentence(detail.reason || "The server refused the connection."), "Try again", () => (status("connecting", "Connecting"), link.connect()));
    return;
  }
  status("lost", "Connection lost, trying again");
});

// ---- what the person does

function start(request, file) {
  state.request = request;
  explain(request.scheme);
  if (file) link.sendFile(file);
  if (!link.send("start", request)) begin.fault("Not connected yet; wait a moment.");
}

function act(key) {
  if (key === "?" || key === "h" || key === "H") return help();
  if (key === "f" || key === "F") return fullScreen();
  if (key === "n" || key === "N") return $("new").click(), true;
  if (!state.session || begin.shown) return false;
  if (key === " ") return pause(), true;
  if (key === "r" || key === "R") return record(), true;
  if (key === "0") return restart(), true;
  return false;
}

function keysChanged(held) {
  if (!state.session || !state.world) return;
  link.send("keys", { held });
  // What was asked for already was begun with other keys.
  if (held) state.pressed = { at: performance.now(), chunk: (state.chunk ? state.served + 1 : 0) + player.outstanding };
}

function pause() {
  if (!state.session || state.ended) return;
  state.paused = !state.paused;
  player.playing = !state.paused;
  press("pause", state.paused);
  $("pause").firstElementChild.textContent = state.paused ? "Go on" : "Pause";
  $("live").dataset.mood = mood();
  $("live-text").textContent = words();
}

function record() {
  if (state.session) link.send("record", { on: !recorder.on });
}

function restart() {
  if (!state.session || !link.send("reset")) return;
  fresh();
  // What is under way belongs to the world before.
  state.stale = true;
  note("");
}

function help() {
  $("help-keys").replaceChildren(
    ...Object.entries({ ...state.words, Space: "pause and go on", R: "record", 0: "from the start", N: "new world", F: "full screen" }).flatMap(([key, what]) => {
      const term = document.createElement("dt"), cap = document.createElement("kbd"), does = document.createElement("dd");
      cap.textContent = key.length === 1 ? key.toUpperCase() : key;
      does.textContent = what;
      term.append(cap);
      return [term, does];
    }),
  );
  $("help").showModal();
  return true;
}

function fullScreen() {
  document.fullscreenElement ? document.exitFullscreen() : stage.requestFullscreen?.().catch(() => note("This browser does not allow full screen here."));
  return true;
}

$("pause").onclick = pause;
$("record").onclick = record;
$("reset").onclick = restart;
$("new").onclick = () => (begin.shown && state.session ? begin.hide() : begin.show(Boolean(state.session)));
$("help-open").onclick = help;
$("full").onclick = fullScreen;
addEventListener("keydown", (event) => event.key === "Escape" && begin.shown && state.session && begin.hide());

// ---- what shows

function shown(frame, now) {
  path.push(frame.pose);
  if (state.pressed && frame.chunk >= state.pressed.chunk) {
    meters.show("reaction", ((now - state.pressed.at) / 1000).toFixed(2), "s");
    state.pressed = null;
  }
}

setInterval(() => {
  path.draw();
  if (!state.session) return;
  const [x, z, y] = path.position;
  const degrees = Math.round((path.heading * 180) / Math.PI) || 0;
  $("place").textContent = `x ${x.toFixed(2)} · z ${z.toFixed(2)} · up ${y.toFixed(2)} · heading ${degrees}°`;
  screen.setAttribute("aria-label", `The world, seen from x ${x.toFixed(1)}, z ${z.toFixed(1)}, heading ${degrees} degrees`);
  meters.show("fps", player.rate.toFixed(player.rate < 10 ? 1 : 0), `of ${state.world.fps}`);
  meters.show("queue", String(player.buffered), "frames");
  if (recorder.on) $("live-text").textContent = words();
}, 100);

function mood() {
  if (recorder.on) return "record";
  if (state.paused) return "still";
  return state.chunk?.behind ? "slow" : "live";
}

function words() {
  if (recorder.on) return `Recording, ${recorder.words}`;
  if (state.paused) return "Paused";
  const dropped = state.chunk?.dropped ? `, ${state.chunk.dropped} chunks dropped` : "";
  if (state.chunk?.behind) return `Slower than real time, ${state.chunk.pace.toFixed(2)}×${dropped}`;
  return `Live, ${state.chunk ? `${state.chunk.pace.toFixed(1)}× real time` : "starting"}${dropped}`;
}

function explain(scheme) {
  state.words = controls.describe(state.schemes?.[scheme] ?? { yaw: "ad" });
}

function fresh() {
  Object.assign(state, { paused: false, ended: false, chunk: null, served: 0, pressed: null });
  press("pause", false);
  $("pause").firstElementChild.textContent = "Pause";
  $("caption").textContent = state.request?.prompt ?? "";
  path.clear();
  path.fov = state.request?.fov ?? 70;
  meters.clear();
  player.start(state.world.fps, state.chunkFrames);
  $("live").hidden = false;
  $("live").dataset.mood = "live";
  $("live-text").textContent = "Live, starting";
}

function gone(message) {
  state.session = null;
  buttons(false);
  player.playing = false;
  $("live").hidden = true;
  begin.show(false);
  begin.fault(sentence(message));
}

function saveRecording() {
  const file = recorder.end();
  if (file) note(`Saved ${recorder.save(file)}.`);
  $("live").dataset.mood = mood();
}

function buttons(on) {
  for (const name of ["pause", "record", "reset"]) $(name).disabled = !on;
}

function press(name, on) {
  $(name).setAttribute("aria-pressed", String(on));
}

function status(name, text) {
  document.body.dataset.state = name;
  $("status").textContent = text;
}

let noteTimer;
function note(text, label, action) {
  clearTimeout(noteTimer);
  $("note").hidden = !text;
  $("note-text").textContent = text;
  $("note-act").hidden = !label;
  $("note-act").textContent = label ?? "";
  $("note-act").onclick = () => ($("note").hidden = true, action?.());
  if (text && !label) noteTimer = setTimeout(() => ($("note").hidden = true), 6000);
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}

link.connect();
