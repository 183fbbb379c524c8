// Two small charts, as SVG: seconds a chunk, and bytes by role.

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 420, HEIGHT = 150, LEFT = 58, RIGHT = 8, TOP = 14, BOTTOM = 22;
export const COLOURS = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];

function shape(kind, attributes, text) {
  const made = document.createElementNS(NS, kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

export function colour(number) {
  return `var(${COLOURS[number % COLOURS.length]})`;
}

export function bytes(size) {
  const units = ["B", "kB", "MB", "GB"];
  const power = size > 0 ? Math.min(3, Math.floor(Math.log10(size) / 3)) : 0;
  return `${(size / 1000 ** power).toPrecision(3)} ${units[power]}`;
}

function frame(title, description) {
  const box = document.createElement("div");
  box.className = "chart";
  const heading = document.createElement("h3");
  heading.textContent = title;
  const svg = shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": description });
  svg.append(shape("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  box.append(heading, svg);
  return { box, svg };
}

function axis(svg, most, least, last, shown) {
  svg.append(shape("text", { x: LEFT - 5, y: TOP + 4, "text-anchor": "end" }, shown(most)));
  svg.append(shape("text", { x: LEFT - 5, y: HEIGHT - BOTTOM, "text-anchor": "end" }, "0"));
  svg.append(shape("text", { x: LEFT, y: HEIGHT - 6 }, `chunk ${least}`));
  svg.append(shape("text", { x: WIDTH - RIGHT, y: HEIGHT - 6, "text-anchor": "end" }, `${last}`));
}

/** Lines: [{name, points: [{chunk, seconds}]}]. */
export function secondsChart(lines) {
  const points = lines.flatMap((line) => line.points);
  const most = Math.max(...points.map((point) => point.seconds), 0.001) * 1.15;
  const least = Math.min(...points.map((point) => point.chunk)), last = Math.max(...points.map((point) => point.chunk));
  const { box, svg } = frame("Seconds a chunk", `Seconds for each chunk, ${least} to ${last}`);
  axis(svg, most, least, last, (value) => value.toPrecision(2));
  const x = (chunk) => LEFT + ((WIDTH - LEFT - RIGHT) * (chunk - least)) / Math.max(1, last - least);
  const y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * value) / most;
  lines.forEach((line, number) => {
    const path = line.points.map((point, i) => `${i ? "L" : "M"}${x(point.chunk).toFixed(1)} ${y(point.seconds).toFixed(1)}`);
    const drawn = shape("path", { d: path.join(""), fill: "none", "stroke-width": 2 });
    drawn.style.stroke = colour(number);
    svg.append(drawn);
  });
  box.append(legend(lines.map((line) => `${line.name}: ${line.rate}`)));
  return box;
}

const roleColours = new Map(); // the same for all sessions

/** Give colours to roles of keys and values, in an order that does not hang on which chunk came first. */
export function knowRoles(roles) {
  [...new Set(roles)].sort().forEach((role) => roleColours.has(role) || roleColours.set(role, roleColours.size));
}

/** Bars of one session: [{chunk, kv: {role: bytes}}]. */
export function bytesChart(name, bars) {
  const roles = [...new Set(bars.flatMap((bar) => Object.keys(bar.kv)))];
  knowRoles(roles);
  const total = (bar) => Object.values(bar.kv).reduce((sum, size) => sum + size, 0);
  const most = Math.max(...bars.map(total), 1) * 1.1;
  const least = bars[0].chunk, last = bars.at(-1).chunk;
  const { box, svg } = frame(`Keys and values, ${name}: ${bytes(total(bars.at(-1)))}`, `Bytes by role, chunk ${least} to ${last}`);
  axis(svg, most, least, last, bytes);
  const wide = (WIDTH - LEFT - RIGHT) / bars.length;
  bars.forEach((bar, place) => {
    let height = 0;
    roles.forEach((role) => {
      const part = ((HEIGHT - TOP - BOTTOM) * (bar.kv[role] ?? 0)) / most;
      height += part;
      const drawn = shape("rect", {
        x: (LEFT + place * wide).toFixed(2), width: Math.max(0.5, wide * 0.86).toFixed(2),
        y: (HEIGHT - BOTTOM - height).toFixed(2), height: part.toFixed(2),
      });
      drawn.style.fill = colour(roleColours.get(role));
      svg.append(drawn);
    });
  });
  box.append(legend(roles.map((role) => `${role} ${bytes(bars.at(-1).kv[role] ?? 0)}`), roles.map((role) => roleColours.get(role))));
  return box;
}

function legend(names, colours = [...names.keys()]) {
  const list = document.createElement("ul");
  list.className = "legend";
  names.forEach((name, place) => {
    const item = document.createElement("li");
    const mark = document.createElement("span");
    mark.className = "mark";
    mark.style.background = colour(colours[place]);
    item.append(mark, name);
    list.append(item);
  });
  return list;
}
