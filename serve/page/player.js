// Plays fragments of mp4 as they come, and keeps them for a download.

const AHEAD = 8; // seconds that may lie before the playhead: then chunks are not acknowledged, and the service waits
const BEHIND = 30; // seconds that stay behind it
const KEPT = 256 * 2 ** 20; // bytes for a download

export class Player {
  constructor(figure, onTime) {
    this.figure = figure;
    this.video = figure.querySelector("video");
    this.caption = figure.querySelector("figcaption");
    this.notice = figure.querySelector(".wait");
    this.queue = [];
    this.kept = [];
    this.size = 0;
    this.tooLarge = false;
    this.video.addEventListener("timeupdate", () => {
      this.trim(BEHIND);
      this.next();
      onTime();
    });
    this.video.addEventListener("waiting", onTime);
  }

  /** A video begins: what it holds, and the head of its stream. */
  begin(started, head) {
    const Source = window.ManagedMediaSource ?? window.MediaSource;
    const kind = `video/mp4; codecs="${started.codec}"`;
    if (!Source?.isTypeSupported(kind)) throw new Error(`This browser does not play ${kind}.`);
    this.kind = kind;
    this.fps = started.fps;
    this.source = new Source();
    this.video.disableRemotePlayback = true;
    this.video.src = URL.createObjectURL(this.source);
    this.video.style.imageRendering = started.width < 640 ? "pixelated" : "auto";
    this.kept = [head];
    this.size = head.byteLength;
    this.queue = [head];
    this.source.addEventListener("sourceopen", () => {
      URL.revokeObjectURL(this.video.src);
      this.buffer = this.source.addSourceBuffer(kind);
      this.buffer.addEventListener("updateend", () => this.next());
      this.next();
    }, { once: true });
  }

  add(fragment) {
    this.queue.push(fragment);
    if (this.size + fragment.byteLength <= KEPT) {
      this.kept.push(fragment);
      this.size += fragment.byteLength;
    } else {
      this.tooLarge = true;
    }
    this.next();
  }

  next() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    const ranges = this.video.buffered;
    if (ranges.length && this.video.currentTime < ranges.start(0)) this.video.currentTime = ranges.start(0);
    if (this.queue.length) {
      try {
        this.buffer.appendBuffer(this.queue[0]);
      } catch (error) {
        if (error.name !== "QuotaExceededError") throw error;
        this.trim(1); // what was shown makes room; then, or as the video goes on, it is tried again
        return;
      }
      this.queue.shift();
      if (this.video.paused && !this.held) this.video.play().catch(() => {});
    } else if (this.complete) {
      this.source.endOfStream();
    }
  }

  /** Let go of what was shown more than so many seconds ago, where it is as much again. */
  trim(behind) {
    const ranges = this.video.buffered;
    const until = this.video.currentTime - behind;
    if (this.buffer && !this.buffer.updating && ranges.length && ranges.start(0) < until - behind) {
      this.buffer.remove(ranges.start(0), until);
    }
  }

  /** Seconds that are there and not yet shown. */
  get ahead() {
    const ranges = this.video.buffered;
    const waiting = this.queue.length; // of unknown length; the service sends few
    return ranges.length ? ranges.end(ranges.length - 1) - this.video.currentTime + waiting : waiting;
  }

  get hasEnough() {
    return this.ahead > AHEAD;
  }

  /** The frame that is shown, counted from the first of the video. */
  get frame() {
    return Math.floor(this.video.currentTime * this.fps + 1e-3);
  }

  hold(held) {
    this.held = held;
    if (held) this.video.pause();
    else this.video.play().catch(() => {});
  }

  finish() {
    this.complete = true;
    this.next();
  }

  say(text) {
    this.notice.hidden = !text;
    this.notice.textContent = text ?? "";
  }

  /** What was sent so far, as a file. */
  get file() {
    return new Blob(this.kept, { type: "video/mp4" });
  }
}
