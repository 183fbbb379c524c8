// A live session over a WebSocket, as docs/serving.md has it: it comes back by itself when the socket is lost.

const PROTOCOL = 1;
const FIRST_DELAY = 500, LONGEST_DELAY = 5000; // ms, between attempts to come back

export class Refused extends Error {
  constructor(event) {
    super(event.message);
    this.code = event.code;
    this.retryAfter = event.retry_after;
  }
}

/** A socket that has said hello. Resolves with {socket, welcome}; rejects with Refused, or Error. */
export function greet(token) {
  return new Promise((resolve, reject) => {
    const url = new URL("v1/live", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url);
    socket.binaryType = "arraybuffer";
    socket.onopen = () => socket.send(JSON.stringify({ type: "hello", protocol: PROTOCOL, token: token || null }));
    socket.onerror = () => reject(new Error("The service does not answer."));
    socket.onclose = () => reject(new Error("The service closed the connection."));
    socket.onmessage = (message) => {
      const event = JSON.parse(message.data);
      if (event.type === "welcome") resolve({ socket, welcome: event });
      else reject(new Refused(event));
    };
  });
}

/**
 * One session. `on(event, parts)` is called for every event of the service, with its binary parts; `onLost(seconds)`
 * while the socket is gone, and `onBack()` when it is there again.
 */
export class Live {
  constructor(token, { on, onLost, onBack }) {
    this.token = token;
    this.on = on;
    this.onLost = onLost;
    this.onBack = onBack;
    this.socket = null;
    this.session = this.key = null;
    this.last = -1; // chunk that arrived whole
    this.over = false;
    this.patience = 0;
    this.ahead = 0; // chunks that the service makes beyond the last one that was acknowledged
    this.acknowledged = -1;
    this.unsaid = []; // while the socket is gone
  }

  async start(message, picture) {
    const { socket, welcome } = await greet(this.token);
    if (this.over) { // closed meanwhile
      socket.close();
      return;
    }
    this.patience = welcome.lost_seconds;
    this.ahead = welcome.ahead;
    this.listen(socket);
    this.say({ type: "start", ...message, image: picture ? picture.byteLength : null });
    if (picture) socket.send(picture);
  }

  say(message) {
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
    else if (this.session && !this.over) this.unsaid.push(message); // said once it is back
  }

  acknowledge(chunk) {
    this.acknowledged = chunk;
    if (this.socket?.readyState === WebSocket.OPEN) this.say({ type: "ack", chunk });
  }

  /** The first chunk that is certainly not begun yet. */
  get future() {
    return this.acknowledged + this.ahead + 1;
  }

  close() {
    this.over = true;
    this.socket?.close();
  }

  listen(socket) {
    this.socket = socket;
    let event = null, parts = [];
    socket.onmessage = (message) => {
      if (typeof message.data === "string") {
        event = JSON.parse(message.data);
        parts = [];
      } else {
        parts.push(message.data);
      }
      if (event && parts.length === (event.parts ?? 0)) {
        const whole = event;
        event = null;
        this.hear(whole, parts);
      }
    };
    socket.onerror = null;
    socket.onclose = () => {
      if (!this.over) this.comeBack();
    };
  }

  hear(event, parts) {
    if (event.type === "queued" || event.type === "started") {
      this.session = event.session;
      this.key = event.key;
    }
    if (event.type === "chunk") this.last = event.chunk;
    if (event.type === "ended") this.over = true;
    this.on(event, parts);
    // Nothing was begun, or it is no more: there is nothing to wait for.
    if (event.type === "error" && !this.over && (!this.session || event.code === "gone")) {
      this.end(event.message);
      this.socket.close();
    }
  }

  async comeBack() {
    if (!this.session) {
      this.end("The connection was lost before the video began.");
      return;
    }
    const until = performance.now() + this.patience * 1000;
    for (let delay = FIRST_DELAY; performance.now() < until; delay = Math.min(delay * 2, LONGEST_DELAY)) {
      this.onLost((until - performance.now()) / 1000);
      await new Promise((resolve) => setTimeout(resolve, delay));
      if (this.over) return;
      try {
        const { socket } = await greet(this.token);
        this.listen(socket);
        this.say({ type: "resume", session: this.session, key: this.key, after: this.last });
        this.unsaid.splice(0).forEach((message) => this.say(message));
        this.onBack();
        return;
      } catch (error) {
        if (error instanceof Refused) break;
      }
    }
    this.end("The connection was lost, and the session with it.");
  }

  end(message) {
    this.over = true;
    this.on({ type: "ended", reason: "lost", chunks: this.last + 1, message, state: null }, []);
  }
}
