"use strict";
// Names and paths come from outside: they only ever meet the page as text, never as markup.

const page = JSON.parse(document.getElementById("data").textContent);
const pictures = page.pictures; // most suspect first
const isSuspect = (picture) => picture.anomalous > 0.5; // a probability
const BATCH = 60; // cards made at a time, as the reader scrolls
const COLORS = { normal: "--normal", bad: "--bad", unknown: "--unknown" };
const byId = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "rect", "text", "circle", "g", "title"].includes(tag);
  const element = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function short(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 1e5)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

// --- heading ---------------------------------------------------------------------------------

function tile(value, caption, kind = "") {
  const strong = make("strong", {}, String(value));
  byId("tiles").append(make("li", { class: kind }, strong, make("span", {}, caption)));
  return strong;
}

byId("heading").textContent = page.heading;
byId("subtitle").textContent = page.subtitle;
byId("verdict").textContent = page.verdict;
const suspects = pictures.filter(isSuspect).length;
const mean = pictures.reduce((sum, picture) => sum + picture.weight, 0) / pictures.length;
tile(pictures.length.toLocaleString("en"), "training pictures");
tile(
  suspects.toLocaleString("en"),
  `suspects (${((100 * suspects) / pictures.length).toFixed(1)} %)`,
  suspects ? "alarm" : "",
);
tile(mean.toFixed(2), "mean weight");
for (const [caption, value] of page.highlights) tile(value.toFixed(3), caption);
const droppedTile = tile("0", "marked to drop");

// --- curves and histograms -------------------------------------------------------------------

const WIDTH = 260, HEIGHT = 150, LEFT = 36, RIGHT = 8, TOP = 10, BOTTOM = 30;

function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 2));
  const size = [5, 2, 1].map((factor) => factor * step).find((s) => (high - low) / s >= 2) ?? step;
  const found = [];
  for (let k = Math.ceil(low / size - 1e-9); k * size <= high + 1e-9 * size; k++) found.push(k * size);
  return found;
}

function frame(caption, [x0, x1], [y0, y1], xName, whole = false) {
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": caption });
  const x = (v) => LEFT + ((v - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT);
  const y = (v) => HEIGHT - BOTTOM - ((v - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  for (const v of ticks(y0, y1)) {
    svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(v), y2: y(v), class: "axis" }));
    svg.append(make("text", { x: LEFT - 6, y: y(v) + 3.5, "text-anchor": "end" }, short(v)));
  }
  for (const v of ticks(x0, x1)) {
    if (whole && !Number.isInteger(v)) continue;
    const at = { x: x(v), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" };
    svg.append(make("text", at, short(v)));
  }
  svg.append(make("text", { x: (WIDTH + LEFT) / 2, y: HEIGHT - 2, "text-anchor": "middle" }, xName));
  const title = make("figcaption", {}, caption);
  byId("charts").append(make("figure", {}, title, svg));
  return { svg, x, y };
}

function key(svg, name, color) {
  const entry = make("span", { class: "key" }, name);
  entry.style.color = color;
  svg.previousElementSibling.append(" ", entry);
}

function curve({ caption, series }) {
  const known = series.flatMap(({ values }) => values).filter((v) => v !== null);
  if (!known.length) return;
  if (known.every((v) => v === 0)) {
    const off = make("p", { class: "off" }, "0 in every epoch: switched off in this run.");
    byId("charts").append(make("figure", {}, make("figcaption", {}, caption), off));
    return;
  }
  let low = Math.min(...known), high = Math.max(...known);
  const margin = (high - low || Math.abs(high)) * 0.06;
  [low, high] = [low - margin, high + margin];
  const epochs = series[0].values.length;
  const range = epochs > 1 ? [1, epochs] : [0.5, 1.5];
  const { svg, x, y } = frame(caption, range, [low, high], "epoch", true);
  const colors = ["--accent", "--bad", "--unknown"];
  series.forEach(({ name, values }, i) => {
    const color = `var(${colors[i % colors.length]})`;
    const points = values.map((v, k) => [k + 1, v]).filter(([, v]) => v !== null);
    const path = points.map(([k, v], j) => `${j ? "L" : "M"}${x(k)},${y(v)}`).join("");
    const line = make("path", { d: path, class: "line" });
    line.style.stroke = color;
    svg.append(line);
    for (const [k, v] of epochs > 40 ? points.slice(-1) : points) {
      const dot = make("circle", { cx: x(k), cy: y(v), r: 2.2 }, make("title", {}, `${k}: ${v}`));
      dot.style.fill = color;
      svg.append(dot);
    }
    if (series.length > 1) key(svg, name, color);
    else key(svg, `last ${short(points.at(-1)[1])}`, "var(--soft)");
  });
}

function histogram(caption, what, mark, markName, bounds) {
  const known = pictures.filter((picture) => picture[what] !== null);
  if (!known.length) return;
  const all = known.map((picture) => picture[what]);
  let [low, high] = bounds ?? [Math.min(...all), Math.max(...all)];
  if (low === high) [low, high] = [low - 0.5, high + 0.5];
  const bins = 30;
  const kinds = Object.keys(COLORS).filter((kind) => known.some((picture) => picture.kind === kind));
  const counts = kinds.map(() => new Array(bins).fill(0));
  for (const picture of known) {
    const bin = Math.floor((bins * (picture[what] - low)) / (high - low));
    counts[kinds.indexOf(picture.kind)][Math.min(bin, bins - 1)]++;
  }
  const totals = counts[0].map((_, bin) => counts.reduce((sum, kind) => sum + kind[bin], 0));
  // Square roots, so that a handful of suspects shows beside hundreds of others.
  const top = Math.sqrt(Math.max(...totals));
  const { svg, x, y } = frame(caption, [low, high], [0, 1], "pictures on a root scale");
  svg.querySelectorAll("line, text[text-anchor=end]").forEach((old) => old.remove());
  svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(0), y2: y(0), class: "axis" }));
  const shown = [...new Set([1, Math.round(Math.max(...totals) / 4), Math.max(...totals)])];
  for (const v of shown.filter((v) => v > 0)) {
    const at = { x: LEFT - 6, y: y(Math.sqrt(v) / top) + 3.5, "text-anchor": "end" };
    svg.append(make("text", at, String(v)));
  }
  totals.forEach((_, bin) => {
    let below = 0;
    kinds.forEach((kind, i) => {
      if (!counts[i][bin]) return;
      const from = Math.sqrt(below) / top, to = Math.sqrt((below += counts[i][bin])) / top;
      const left = x(low + (bin / bins) * (high - low));
      const width = (WIDTH - LEFT - RIGHT) / bins - 1;
      const box = { x: left, y: y(to), width, height: Math.max(y(from) - y(to), 0.5), rx: 1 };
      const rect = make("rect", box, make("title", {}, `${counts[i][bin]} ${kind}`));
      rect.style.fill = `var(${COLORS[kind]})`;
      svg.append(rect);
    });
  });
  if (mark !== null && mark >= low && mark <= high) {
    svg.append(make("line", { x1: x(mark), x2: x(mark), y1: TOP - 4, y2: y(0), class: "mark" }));
    const end = x(mark) > WIDTH * 0.6;
    const at = { x: x(mark) + (end ? -5 : 5), y: TOP + 3, "text-anchor": end ? "end" : "start" };
    svg.append(make("text", { ...at, class: "note" }, markName));
  }
  if (kinds.length > 1) kinds.forEach((kind) => key(svg, kind, `var(${COLORS[kind]})`));
}

page.curves.forEach(curve);
if (!page.curves.length) byId("figures-name").textContent = "Scores and weights";
const tau = page.threshold;
const suspicion = page.prior ? "Suspicion, from score and prior" : "Anomaly scores";
histogram(suspicion, "suspicion", tau, `threshold ${short(tau)}`, null);
histogram("Weights", "weight", null, "", [0, 1]);

// --- tables ----------------------------------------------------------------------------------

function cell(value, tag = "td") {
  const number = typeof value === "number";
  return make(tag, number ? { class: "number" } : {}, number ? value.toFixed(3) : String(value ?? "–"));
}

const columns = [...new Set(page.metrics.flatMap((row) => Object.keys(row)))];
if (columns.length) {
  const head = columns.map((name) => {
    const numeric = page.metrics.some((row) => typeof row[name] === "number");
    return make("th", { scope: "col", class: numeric ? "number" : "" }, name);
  });
  const rows = page.metrics.map((row) => make("tr", {}, ...columns.map((name) => cell(row[name]))));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  byId("metrics").append(table);
} else {
  byId("metrics").hidden = true;
}
const settings = Object.entries(page.settings).map(([name, value]) =>
  make("tr", {}, make("th", { scope: "row" }, name), make("td", {}, value)));
byId("settings").append(make("table", {}, make("tbody", {}, ...settings)));

// --- decisions: kept between visits where the browser allows it -------------------------------

const storage = `comet-meta curation ${page.id}`;
const dropped = new Set();
let sampled = false; // whether the sample was ever shown
try {
  JSON.parse(localStorage.getItem(storage) ?? "[]").forEach((i) => i in pictures && dropped.add(i));
  sampled = localStorage.getItem(`${storage} sampled`) === "yes";
} catch { /* private mode, or storage switched off: decisions last as long as the page */ }

function store(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch { /* see above */ }
}

function decide(indices, drop) {
  for (const i of indices) drop ? dropped.add(i) : dropped.delete(i);
  store(storage, JSON.stringify([...dropped]));
  for (const card of gallery.children) paint(card);
  summarise();
}

function summarise() {
  droppedTile.textContent = dropped.size.toLocaleString("en");
  byId("count").textContent =
    `${shown.length.toLocaleString("en")} of ${pictures.length.toLocaleString("en")} pictures shown, ` +
    `${dropped.size.toLocaleString("en")} marked to drop`;
  byId("share").hidden = byId("show").value !== "sample";
  byId("share").textContent = shareInWords();
  byId("copy").disabled = dropped.size === 0;
  byId("mark").disabled = byId("unmark").disabled = shown.length === 0;
}

// --- how many are bad: as share_of_strata in comet_meta/weights/review.py has it ----------------

const sample = new Set(page.review.flatMap(({ ranks }) => ranks));

function estimate() {
  let share = 0, centre = 0, variance = 0;
  for (const { size, ranks } of page.review) {
    const part = size / pictures.length, looks = ranks.length;
    const marked = ranks.filter((i) => dropped.has(i)).length, found = (marked + 0.5) / (looks + 1);
    share += part * marked / looks;
    centre += part * found;
    variance += part ** 2 * found * (1 - found) / looks * (size - looks) / Math.max(size - 1, 1);
  }
  const square = 1.959964 ** 2 * variance / (centre * (1 - centre));
  const middle = (share + square / 2) / (1 + square);
  const half = Math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square);
  const bad = [...sample].filter((i) => dropped.has(i)).length;
  const low = Math.max(middle - half, bad / pictures.length);
  const high = Math.min(middle + half, 1 - (sample.size - bad) / pictures.length);
  return { bad, share, low, high };
}

function shareInWords() {
  const { bad, share, low, high } = estimate();
  const percent = (value) => (100 * value).toFixed(0);
  const given = Number(Math.min(share, 0.49).toFixed(share < 0.1 ? 3 : 2));
  return `Look at each of these ${sample.size} pictures, from the whole ranking, and tick the bad ones. ` +
    `${bad} ${bad === 1 ? "is" : "are"} ticked: about ${percent(share)} % (${percent(low)} to ` +
    `${percent(high)} %) of all ${pictures.length.toLocaleString("en")} pictures are bad. ` +
    `Then export the list and train with --review, or say contamination=${given}.`;
}

// --- gallery ---------------------------------------------------------------------------------

const gallery = byId("gallery");
const sorts = {
  suspect: (a, b) => a - b,
  trusted: (a, b) => b - a,
  high: (a, b) => pictures[b].score - pictures[a].score || a - b,
  low: (a, b) => pictures[a].score - pictures[b].score || a - b,
  path: (a, b) => (pictures[a].path < pictures[b].path ? -1 : 1),
};
const filters = {
  all: () => true,
  sample: (i) => sample.has(i),
  suspects: (i) => isSuspect(pictures[i]),
  drop: (i) => dropped.has(i),
  keep: (i) => !dropped.has(i),
};
let shown = []; // places in `pictures`, in the order of the gallery

function images(picture) {
  const found = [];
  if (picture.image) {
    found.push(make("img", { alt: "", src: `data:image/webp;base64,${picture.image}` }));
  }
  if (picture.heat) {
    found.push(make("img", { alt: "", class: "heat", src: `data:image/webp;base64,${picture.heat}` }));
  }
  return found;
}

function card(i) {
  const picture = pictures[i];
  const frame = make("div", { class: "picture" }, ...images(picture));
  frame.style.aspectRatio = String(page.aspect);
  if (!picture.image) frame.append(make("span", { class: "unseen" }, "no thumbnail"));
  frame.append(make("span", { class: "badge" }, `#${i + 1}`));
  if (picture.kind === "bad") frame.append(make("span", { class: "label" }, picture.defect));
  const open = make("button", { type: "button", class: "open", "aria-label": `Enlarge ${picture.name}` });
  open.append(frame);
  const bar = make("i");
  bar.style.width = `${100 * picture.weight}%`;
  const box = make("input", { type: "checkbox" });
  const facts = make("div", { class: "facts" },
    make("div", { class: "name", title: picture.path }, picture.name),
    make("div", { class: "bar" }, bar),
    make("div", { class: "values" },
      make("span", {}, "weight ", make("b", {}, picture.weight.toFixed(2))),
      make("span", {}, `score ${short(picture.score)}`)),
    make("label", { class: "check drop" }, box, " drop"));
  const kind = isSuspect(picture) ? "card suspect" : "card";
  const made = make("li", { class: kind, "data-i": i }, open, facts);
  paint(made);
  return made;
}

function paint(card) {
  const drop = dropped.has(Number(card.dataset.i));
  card.classList.toggle("dropped", drop);
  card.querySelector(".drop input").checked = drop;
}

function more() {
  const from = gallery.children.length;
  gallery.append(...shown.slice(from, from + BATCH).map(card));
}

function refresh() {
  if (byId("show").value === "sample" && !sampled) {
    sampled = true;
    store(`${storage} sampled`, "yes");
  }
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = filters[byId("show").value];
  shown = [...pictures.keys()]
    .filter((i) => wanted(i) && words.every((word) => pictures[i].path.toLowerCase().includes(word)))
    .sort(sorts[byId("sort").value]);
  gallery.replaceChildren();
  more();
  summarise();
}

new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) more();
}, { rootMargin: "1200px" }).observe(byId("more"));

// A tall batch may leave the sentinel in view without a change to observe.
addEventListener("scroll", () => {
  if (byId("more").getBoundingClientRect().top < innerHeight + 1200) more();
}, { passive: true });

gallery.addEventListener("click", (event) => {
  const open = event.target.closest(".open");
  if (open) view(Number(open.closest(".card").dataset.i));
});
gallery.addEventListener("change", (event) => {
  decide([Number(event.target.closest(".card").dataset.i)], event.target.checked);
});
gallery.addEventListener("keydown", (event) => {
  const card = event.target.closest(".card");
  if (!card || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key.toLowerCase() === "d") {
    const i = Number(card.dataset.i);
    decide([i], !dropped.has(i));
    return;
  }
  const perRow = getComputedStyle(gallery).gridTemplateColumns.split(" ").length;
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: perRow, ArrowUp: -perRow }[event.key];
  if (!step) return;
  event.preventDefault();
  const to = [...gallery.children].indexOf(card) + step;
  if (to >= gallery.children.length) more();
  gallery.children[to]?.querySelector(".open").focus();
});

byId("tools").addEventListener("submit", (event) => event.preventDefault());
byId("filter").addEventListener("input", refresh);
byId("show").addEventListener("change", refresh);
byId("sort").addEventListener("change", refresh);
byId("size").addEventListener("input", (event) => {
  gallery.style.setProperty("--size", `${event.target.value}px`);
});
byId("heat").addEventListener("change", (event) => heated(event.target.checked));
const heatless = !pictures.some((picture) => picture.heat);
for (const id of ["heat", "viewer-heat"]) byId(id).closest("label").hidden = heatless;
byId("truth-label").hidden = !pictures.some((picture) => picture.kind === "bad");
byId("truth").addEventListener("change", (event) => {
  document.body.classList.toggle("untold", !event.target.checked);
});
byId("mark").addEventListener("click", () => decide(shown, true));
byId("unmark").addEventListener("click", () => decide(shown, false));

function heated(on) {
  document.body.classList.toggle("heated", on);
  byId("heat").checked = byId("viewer-heat").checked = on;
}

// --- what goes out ---------------------------------------------------------------------------

function say(text) {
  byId("message").textContent = text;
}

const inOrder = () => [...dropped].sort((a, b) => a - b);

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("the browser refused");
  }
}

byId("copy").addEventListener("click", () => {
  copy(inOrder().map((i) => pictures[i].path).join("\n")).then(
    () => say(`${dropped.size} ${dropped.size === 1 ? "path" : "paths"} copied.`),
    () => say("The browser doesn't allow copying; export the list instead."));
});

const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

byId("export").addEventListener("click", () => {
  const lines = pictures.map((picture, i) => [
    quoted(picture.path), picture.score ?? "", picture.weight, picture.anomalous, i + 1,
    dropped.has(i) ? "no" : "yes", sampled && sample.has(i) ? "yes" : "no",
  ].join(","));
  const csv = ["path,score,weight,p_bad,rank,keep,reviewed", ...lines, ""].join("\r\n");
  const url = URL.createObjectURL(new Blob([csv], { type: "text/csv" }));
  const name = `${page.heading.replace(/[^\w.-]+/g, "_")}_keep_drop.csv`;
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
  say(`${name}: ${dropped.size} to drop, ${pictures.length - dropped.size} to keep.`);
});

// --- one picture, large ----------------------------------------------------------------------

const viewer = byId("viewer");
let viewed = 0;

function view(i) {
  viewed = i;
  const picture = pictures[i];
  byId("viewer-name").textContent = `#${i + 1}  ${picture.name}`;
  const box = byId("viewer-picture");
  box.replaceChildren(...images(picture));
  box.style.aspectRatio = String(page.aspect);
  box.style.width = `min(86vw, 560px, ${62 * page.aspect}vh)`;
  const facts = [
    ["Weight", picture.weight.toFixed(3)],
    ["P(anomalous)", picture.anomalous.toFixed(3)],
    ["Score", short(picture.score)],
  ];
  if (page.prior) facts.push(["Suspicion", short(picture.suspicion)]);
  if (picture.kind === "bad" && byId("truth").checked) facts.push(["Known label", picture.defect]);
  facts.push(["Path", picture.path]);
  byId("viewer-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  byId("viewer-drop").checked = dropped.has(i);
  byId("viewer-link").href = picture.uri;
  const place = shown.indexOf(i);
  byId("previous").disabled = place <= 0;
  byId("next").disabled = place < 0 || place >= shown.length - 1;
  if (!viewer.open) viewer.showModal();
}

function turn(step) {
  const to = shown[shown.indexOf(viewed) + step];
  if (to !== undefined) view(to);
}

byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));
byId("close").addEventListener("click", () => viewer.close());
byId("viewer-heat").addEventListener("change", (event) => heated(event.target.checked));
byId("viewer-drop").addEventListener("change", (event) => decide([viewed], event.target.checked));
viewer.addEventListener("click", (event) => {
  if (event.target === viewer) viewer.close(); // outside of its content
});
viewer.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toLowerCase();
  if (key === "arrowleft") turn(-1);
  else if (key === "arrowright") turn(1);
  else if (key === "h") heated(!byId("heat").checked);
  else if (key === "d") {
    decide([viewed], !dropped.has(viewed));
    byId("viewer-drop").checked = dropped.has(viewed);
  }
});

refresh();
