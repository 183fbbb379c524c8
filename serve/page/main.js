// The page: one or two sessions, what they show, and what is said to them.

import { bytesChart, colour, knowRoles, secondsChart } from "./charts.js";
import { greet, Live, Refused } from "./live.js";
import { Player } from "./player.js";

const SHOWN = 60; // chunks that charts show
const WIDE = 480; // pixels that tiny frames are enlarged to
const TOKEN = "forcingkv token";

const element = (id) => document.getElementById(id);
const number = (id) => (element(id).value.trim() === "" ? null : Number(element(id).value));
const buttons = ["switch", "pause", "stop", "save"];

let bundles = [];
let sides = [];
let token = sessionStorage.getItem(TOKEN) ?? "";
let paused = false;

function tell(text, trouble = false) {
  element("said").textContent = text;
  element("said").classList.toggle("trouble", trouble);
}

/** One session and its player. */
class Side {
  constructor(bundle, place) {
    this.bundle = bundle;
    const figure = element("player-template").content.cloneNode(true).querySelector("figure");
    figure.querySelector("video").setAttribute("aria-label", `Video of ${bundle.name}`);
    element("players").append(figure);
    this.player = new Player(figure, () => this.onTime());
    this.place = place;
    this.chunks = []; // {chunk, seconds (making it), every (since the one before), kv, prompt, firstFrame, frames}
    this.prompts = []; // {chunk, words}
    this.owed = null; // chunk that is not acknowledged yet
    this.live = new Live(token, {
      on: (event, parts) => this.hear(event, parts),
      onLost: (left) => this.player.say(`Connection lost. Trying to come back for ${left.toFixed(0)} s…`),
      onBack: () => this.player.say(""),
    });
    this.caption();
  }

  async start(message, picture) {
    const enlarge = Math.max(1, Math.min(16, Math.ceil(WIDE / this.bundle.width)));
    await this.live.start({ ...message, bundle: this.bundle.name, frames: "mp4", enlarge }, picture);
  }

  hear(event, parts) {
    switch (event.type) {
      case "queued": {
        const wait = event.wait_seconds === null ? "" : `, some ${Math.ceil(event.wait_seconds)} s`;
        this.player.say(`Waiting for a place: number ${event.place}${wait}`);
        break;
      }
      case "started":
        this.player.say("");
        if (!this.player.source) this.begin(event, parts[0]);
        break;
      case "chunk":
        this.take(event, parts[0]);
        break;
      case "switched":
        this.prompts = this.prompts.filter((prompt) => prompt.chunk < event.chunk);
        this.prompts.push({ chunk: event.chunk, words: event.prompt });
        tell(`${this.bundle.name}: “${event.prompt}” takes effect with chunk ${event.chunk}.`);
        showPrompts();
        break;
      case "saved":
        tell(`${this.bundle.name}: the state before chunk ${event.chunk} is kept as ${event.state}.`);
        break;
      case "playing":
        this.player.say("");
        break;
      case "asleep":
        this.player.say("Paused for long: saved. Play goes on from there.");
        break;
      case "error":
        tell(event.message, true);
        break;
      case "ended":
        this.player.finish();
        this.player.say("");
        this.ended = event;
        tell(`${this.bundle.name}: ${event.message}`, !["complete", "stopped"].includes(event.reason));
        settle();
        break;
    }
  }

  begin(event, head) {
    try {
      this.player.begin(event, head);
    } catch (error) {
      tell(error.message, true);
      this.live.close();
    }
    if (event.prompt) this.prompts = [{ chunk: event.next_chunk, words: event.prompt }];
    showPrompts();
  }

  take(event, fragment) {
    this.player.add(fragment);
    this.chunks.push({
      chunk: event.chunk, seconds: event.seconds.total, every: event.every, kv: event.kv_bytes, prompt: event.prompt,
      firstFrame: event.first_frame, frames: event.frames,
    });
    if (this.chunks.length > 10 * SHOWN) this.chunks.splice(0, SHOWN);
    this.owed = event.chunk;
    this.acknowledge();
    this.caption();
    showNumbers();
  }

  /** Say that chunks arrived, unless enough of them wait to be shown. */
  acknowledge() {
    if (this.owed !== null && !this.player.hasEnough) {
      this.live.acknowledge(this.owed);
      this.owed = null;
    }
  }

  onTime() {
    this.acknowledge();
    this.caption();
    showPrompts();
  }

  /** The chunk that is on the screen. */
  get shown() {
    const frame = this.player.frame;
    return this.chunks.findLast((chunk) => chunk.firstFrame <= frame)?.chunk ?? null;
  }

  get last() {
    return this.chunks.at(-1)?.chunk ?? -1;
  }

  /** Frames a second that the service makes, over the last chunks. */
  get rate() {
    const some = this.chunks.slice(-8);
    const seconds = some.reduce((sum, chunk) => sum + chunk.every, 0);
    return seconds ? some.reduce((sum, chunk) => sum + chunk.frames, 0) / seconds : 0;
  }

  caption() {
    const parts = [this.bundle.name];
    if (this.chunks.length) {
      parts.push(`${this.chunks.at(-1).seconds.toFixed(2)} s a chunk`, `${this.rate.toFixed(1)} frames a second`);
      parts.push(`chunk ${this.shown ?? 0} of ${this.last} made`);
    } else {
      parts.push(`${this.bundle.policy}, ${this.bundle.width}×${this.bundle.height}`);
    }
    this.player.caption.textContent = parts.join(" · ");
  }
}

function showPrompts() {
  const all = [...new Map(sides.flatMap((side) => side.prompts).map((one) => [`${one.chunk} ${one.words}`, one])).values()];
  all.sort((one, other) => one.chunk - other.chunk);
  const now = sides[0]?.shown ?? 0;
  const current = all.findLast((one) => one.chunk <= now);
  const text = JSON.stringify([all, current]);
  const list = element("prompts");
  if (list.dataset.shown === text) return;
  list.dataset.shown = text;
  list.replaceChildren(...all.map((one, place) => {
    const item = document.createElement("li");
    item.classList.toggle("now", one === current);
    if (one === current) item.setAttribute("aria-current", "true");
    const [mark, from, words] = ["mark", "from", "words"].map((name) => {
      const made = document.createElement("span");
      made.className = name;
      return made;
    });
    mark.style.background = colour(place);
    from.textContent = `from chunk ${one.chunk}`;
    words.textContent = one.words;
    item.append(mark, from, words);
    return item;
  }));
}

let drawing = false;
function showNumbers() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const filled = sides.filter((side) => side.chunks.length);
    if (!filled.length) return;
    const lines = filled.map((side) => ({
      name: side.bundle.name,
      rate: `${side.chunks.at(-1).seconds.toFixed(2)} s`,
      points: side.chunks.slice(-SHOWN),
    }));
    const bars = filled.map((side) => bytesChart(side.bundle.name, side.chunks.slice(-SHOWN)));
    element("numbers").replaceChildren(secondsChart(lines), ...bars);
  });
}

/** Which buttons can be used. */
function settle() {
  const running = sides.some((side) => !side.ended);
  buttons.forEach((id) => { element(id).disabled = !running; });
  element("start").disabled = !bundles.length;
  element("start").textContent = running ? "Start anew" : "Start";
  element("download").disabled = !sides.some((side) => side.player.kept.length > 1) && !running;
}

async function start(event) {
  event.preventDefault();
  sides.forEach((side) => {
    side.live.say({ type: "stop" });
    side.live.close();
  });
  element("players").replaceChildren();
  element("numbers").replaceChildren();
  setPaused(false);
  const named = [element("bundle").value, element("other").value].filter(Boolean);
  sides = named.map((name, place) => new Side(bundles.find((bundle) => bundle.name === name), place));
  element("players").classList.toggle("two", sides.length > 1);
  showPrompts();
  const file = element("picture").files[0];
  const picture = file ? await file.arrayBuffer() : null;
  const message = { prompt: element("prompt").value.trim(), seed: number("seed") ?? 0, chunks: number("chunks") };
  tell("Starting…");
  element("start").disabled = true; // until it is known whether it starts
  try {
    await Promise.all(sides.map((side) => side.start(message, picture)));
    tell(sides.length > 1 ? `${named.join(" and ")}, from the same seed.` : `${named[0]} is on.`);
  } catch (error) {
    sides.forEach((side) => {
      side.live.close();
      side.ended ??= error;
    });
    refuse(error);
  }
  settle();
}

function refuse(error) {
  tell(error.message, true);
  if (error instanceof Refused && error.code === "unauthorized") element("token-form").hidden = false;
}

function switchPrompt() {
  const prompt = element("prompt").value.trim();
  if (!prompt) return tell("Write a prompt first.", true);
  const going = sides.filter((side) => !side.ended);
  // Two sides switch with the same chunk, so that they can be compared.
  const at = going.length > 1 ? Math.max(...going.map((side) => side.live.future)) : null;
  going.forEach((side) => side.live.say({ type: "switch", prompt, at }));
}

function setPaused(value) {
  paused = value;
  element("pause").textContent = paused ? "Play" : "Pause";
  element("pause").setAttribute("aria-pressed", String(paused));
}

function pause() {
  setPaused(!paused);
  sides.forEach((side) => {
    side.live.say({ type: paused ? "pause" : "play" });
    side.player.hold(paused);
  });
}

function download() {
  sides.filter((side) => side.player.kept.length > 1).forEach((side) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(side.player.file);
    link.download = `${side.bundle.name}-${number("seed") ?? 0}.mp4`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    if (side.player.tooLarge) tell("The video is long: the download has its beginning.", true);
  });
}

function option(value, text) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

function showBundles(welcome) {
  bundles = welcome.bundles;
  knowRoles(bundles.flatMap((bundle) => Object.keys(bundle.kv_bytes)));
  const named = bundles.map((bundle) => option(bundle.name, `${bundle.name} (${bundle.model}, ${bundle.policy})`));
  element("bundle").replaceChildren(...named);
  element("other").replaceChildren(option("", "nothing"), ...named.map((one) => one.cloneNode(true)));
  element("connection").textContent = `Version ${welcome.version}, ${welcome.sessions} sessions fit`;
  showBundle();
}

function showBundle() {
  const bundle = bundles.find((one) => one.name === element("bundle").value);
  element("picture-field").hidden = !bundle?.picture;
  const hints = [];
  if (bundle?.words.length) hints.push(`Words: ${bundle.words.join(" ")}`);
  if (bundle?.prompts.length) hints.push(`Prompts: ${bundle.prompts.slice(0, 5).join(" | ")}`);
  element("prompt-hint").textContent = hints.join(". ");
  if (bundle && !element("prompt").value) element("prompt").value = bundle.example;
}

async function connect() {
  try {
    const { socket, welcome } = await greet(token);
    socket.onclose = null;
    socket.close();
    element("token-form").hidden = true;
    showBundles(welcome);
  } catch (error) {
    element("connection").textContent = "Not connected";
    refuse(error);
  }
  settle();
}

element("controls").addEventListener("submit", start);
element("bundle").addEventListener("change", showBundle);
element("switch").addEventListener("click", switchPrompt);
element("pause").addEventListener("click", pause);
element("stop").addEventListener("click", () => sides.forEach((side) => side.live.say({ type: "stop" })));
element("save").addEventListener("click", () => sides.forEach((side) => side.live.say({ type: "save" })));
element("download").addEventListener("click", download);
element("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = element("token").value;
  sessionStorage.setItem(TOKEN, token);
  connect();
});
connect();
