// The body of a function that Gradio calls once: it gives element, props, trigger and watch.

const tools = element.querySelector(".bar").dataset.tools.split(" "), crops = tools.includes("crop");
const all = (selector) => [...element.querySelectorAll(selector)];
const canvas = element.querySelector("canvas"), screen = canvas.getContext("2d");
const stage = element.querySelector(".stage");
const mask = document.createElement("canvas"), paint = mask.getContext("2d");
const size = element.querySelector("input");
const COLOUR = "rgb(79, 70, 229)";
const MOST_ZOOM = 12;
const FIELD = "input:not([type=range]), textarea, select, [contenteditable]";  // where keys are typed
let tool, picture, drawn = false, box = null, hover = null, last = null, before = null, past = [], future = [];

function choose(name) {
  tool = name;
  all("[data-tool]").forEach((b) => b.setAttribute("aria-pressed", b.dataset.tool === name));
}

// --- showing

function draw() {
  if (!picture) return;
  const unit = canvas.width / Math.max(1, canvas.getBoundingClientRect().width);  // a pixel of the screen
  screen.globalAlpha = 1;
  screen.drawImage(picture, 0, 0);
  if (crops && (box || drawn)) {  // what is left out is dark
    const kept = new OffscreenCanvas(mask.width, mask.height), layer = kept.getContext("2d");
    if (box) layer.fillRect(...box); else layer.drawImage(mask, 0, 0);
    layer.globalCompositeOperation = "source-in";
    layer.drawImage(picture, 0, 0);
    screen.fillStyle = "rgba(20, 20, 20, .7)";
    screen.fillRect(0, 0, canvas.width, canvas.height);
    screen.drawImage(kept, 0, 0);
  } else {
    screen.globalAlpha = .6;
    screen.drawImage(mask, 0, 0);
    screen.fillStyle = COLOUR;
    if (box) screen.fillRect(...box);
  }
  screen.globalAlpha = 1;
  screen.lineWidth = 1.5 * unit;
  screen.strokeStyle = "white";
  if (box) screen.strokeRect(...box);
  if (hover && (tool === "brush" || tool === "eraser")) {
    screen.beginPath();
    screen.arc(...hover, width() / 2, 0, 7);
    screen.stroke();
  }
}
const width = () => Math.max(canvas.width, canvas.height) * size.value / 400;

function load() {
  const value = props.value;
  box = last = hover = null;
  if (value && picture?.src === value.picture) remember();  // what `select` draws can be undone
  else { past = []; future = []; }
  if (!value) { picture = null; return; }
  const image = new Image(), region = new Image();
  image.src = value.picture;
  if (value.mask) region.src = value.mask;
  Promise.all([image.decode(), value.mask && region.decode()]).then(() => {
    canvas.width = mask.width = image.naturalWidth;
    canvas.height = mask.height = image.naturalHeight;
    if (value.mask) paint.drawImage(region, 0, 0);
    paint.globalCompositeOperation = "source-in";
    paint.fillStyle = paint.strokeStyle = COLOUR;
    paint.fillRect(0, 0, mask.width, mask.height);
    paint.lineCap = paint.lineJoin = "round";
    if (picture?.src !== image.src) look(0);
    picture = image;
    drawn = Boolean(value.mask);
    draw();
  });
}

// --- zooming and moving

const view = {zoom: 1, x: 0, y: 0};  // of the canvas from the stage's centre, in pixels of the screen
const fingers = new Map();  // pointers that are down, and where
let moves = false, space = false;  // whether they move the picture; whether the space bar is down

// Zooms by a factor around a point of the screen, which then moves, too; 0 shows the whole picture.
function look(factor, [x, y] = centre(), [dx, dy] = [0, 0]) {
  const on = stage.getBoundingClientRect(), old = view.zoom;
  view.zoom = Math.min(MOST_ZOOM, Math.max(1, old * factor));
  const moved = (from, at, by, length) => {
    const most = length * (view.zoom - 1) / 2;  // no further than to the picture's border
    return Math.max(-most, Math.min(most, at - (at - from) * view.zoom / old + by));
  };
  view.x = moved(view.x, x - on.left - on.width / 2, dx, canvas.offsetWidth);
  view.y = moved(view.y, y - on.top - on.height / 2, dy, canvas.offsetHeight);
  canvas.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.zoom})`;
  draw();
}
function centre() {
  const on = stage.getBoundingClientRect();
  return [on.left + on.width / 2, on.top + on.height / 2];
}
// The middle of two fingers, and how far they are apart; of one pointer, where it is.
function grip() {
  const [a, b = a] = fingers.values();
  return [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2, Math.hypot(a[0] - b[0], a[1] - b[1]) || 1];
}
function follow(event) {
  const [x0, y0, apart0] = grip();
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  const [x, y, apart] = grip();
  if (moves) look(apart / apart0, [x0, y0], [x - x0, y - y0]);
}

// --- drawing

function at(event) {
  const on = canvas.getBoundingClientRect();
  return [(event.clientX - on.left) * canvas.width / on.width, (event.clientY - on.top) * canvas.height / on.height];
}
const pixels = () => paint.getImageData(0, 0, mask.width, mask.height);
function remember(was = pixels()) {
  past = [...past.slice(-19), was];
  future = [];
}
function goBack(from, to) {
  if (last || !from.length) return;
  to.push(pixels());
  paint.putImageData(from.pop(), 0, 0);
  publish();
  draw();
}
function publish() {
  drawn = new Uint32Array(pixels().data.buffer).some((v) => v);
  props.value = {picture: props.value.picture, mask: drawn ? mask.toDataURL("image/png") : ""};
}
function clear() {
  paint.globalCompositeOperation = "source-over";
  paint.clearRect(0, 0, mask.width, mask.height);
}
function stroke(from, to) {
  paint.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
  paint.lineWidth = width();
  paint.beginPath();
  paint.moveTo(...from);
  paint.lineTo(...to);
  paint.stroke();
}
function giveUp() {  // the stroke that is being drawn
  if (last) paint.putImageData(before, 0, 0);
  last = box = null;
  draw();
}

stage.addEventListener("pointerdown", (event) => {
  if (!picture || event.button > 1) return;
  if (event.isPrimary) { fingers.clear(); moves = false; }
  fingers.set(event.pointerId, [event.clientX, event.clientY]);
  stage.setPointerCapture(event.pointerId);
  moves ||= event.button === 1 || space || fingers.size > 1;
  if (moves) { giveUp(); return; }
  if (event.target !== canvas) return;
  before = pixels();
  last = at(event);
  if (tool === "brush" || tool === "eraser") stroke(last, last); else box = [...last, 0, 0];
  draw();
});
stage.addEventListener("pointermove", (event) => {
  if (fingers.has(event.pointerId)) follow(event);
  if (moves) return;
  hover = at(event);
  if (last && box) box = [...last, hover[0] - last[0], hover[1] - last[1]];
  else if (last) { stroke(last, hover); last = hover; }
  draw();
});
stage.addEventListener("pointerup", (event) => {
  fingers.delete(event.pointerId);
  if (!fingers.size) moves = false;
  if (!last) return;
  if (box && tool === "select") { select(...box); last = box = null; draw(); return; }
  if (box) {
    if (crops) clear();
    paint.globalCompositeOperation = "source-over";
    if (box[2] && box[3]) paint.fillRect(...box.map(Math.round));
  }
  last = box = null;
  remember(before);
  publish();
  draw();
});
stage.addEventListener("pointercancel", (event) => {
  fingers.delete(event.pointerId);
  if (!fingers.size) moves = false;
  giveUp();
});
stage.addEventListener("pointerleave", () => { hover = null; draw(); });
stage.addEventListener("pointerenter", (event) => {  // the keys are for what the mouse is on, unless somebody types
  if (event.pointerType === "mouse" && !document.activeElement.matches(FIELD)) canvas.focus({preventScroll: true});
});
stage.addEventListener("wheel", (event) => {
  if (!picture || (view.zoom === 1 && event.deltaY > 0 && !event.ctrlKey)) return;  // it scrolls the page
  event.preventDefault();
  const slow = event.ctrlKey ? 100 : event.deltaMode ? 20 : 500;  // a pinch on a touchpad, lines, pixels
  look(Math.exp(-event.deltaY / slow), [event.clientX, event.clientY]);
}, {passive: false});

// --- select: Python finds the object at a click or in a rough box, and draws it

function select(x, y, w, h) {
  const corners = [[Math.min(x, x + w), Math.min(y, y + h)], [Math.max(x, x + w), Math.max(y, y + h)]];
  const isClick = Math.hypot(w, h) < 0.01 * Math.hypot(canvas.width, canvas.height);
  const at = (isClick ? [[x, y]] : corners).flatMap(([x, y]) => [x / canvas.width, y / canvas.height]);
  trigger("select", { at });
}

// --- buttons and keys

const acts = {
  undo() { goBack(past, future); },
  redo() { goBack(future, past); },
  reset() { remember(); clear(); publish(); draw(); },
  close() { trigger("close"); },
};
all("[data-act]").forEach((b) => b.addEventListener("click", () => acts[b.dataset.act]()));
all("[data-tool]").forEach((b) => {
  b.classList.toggle("absent", !tools.includes(b.dataset.tool) || tools.length === 1);
  b.addEventListener("click", () => choose(b.dataset.tool));
});
size.addEventListener("input", draw);

const keys = {
  "[": () => { size.stepDown(5); draw(); },
  "]": () => { size.stepUp(5); draw(); },
  "+": () => look(1.25),
  "=": () => look(1.25),
  "-": () => look(.8),
  "0": () => look(0),
};
function holdSpace(held) {
  space = held;
  stage.classList.toggle("moves", held);
}
// A button has its key in aria-keyshortcuts, as Z, Control+Z or Control+Shift+Z.
element.addEventListener("keydown", (event) => {
  const third = event.getModifierState("AltGraph");  // how [ is typed on some keyboards
  if (!picture || event.target.matches(FIELD) || (event.altKey && !third)) return;
  const control = (event.ctrlKey || event.metaKey) && !third;
  const name = (control ? "control+" : "") + (control && event.shiftKey ? "shift+" : "") + event.key.toLowerCase();
  const has = (b) => (b.getAttribute("aria-keyshortcuts") || "").toLowerCase().split(" ").includes(name);
  const button = all("button:not(.absent)").find(has);
  if (button) button.click();
  else if (name === " " && event.target === canvas) holdSpace(true);
  else if (keys[name]) keys[name]();
  else return;
  event.preventDefault();
});
element.addEventListener("keyup", (event) => { if (event.key === " ") holdSpace(false); });
element.addEventListener("focusout", () => holdSpace(false));

const named = all("[data-tool][aria-keyshortcuts]:not(.absent)");
element.querySelector(".with-keys").textContent = "Keys: " + [
  ...named.map((b) => `${b.getAttribute("aria-keyshortcuts")} ${b.textContent.toLowerCase()}`),
  "[ ] size", "Ctrl+Z undo", "wheel + − 0 zoom", "space moves",
].join(" · ");
choose(tools[0]);
watch("value", load);
load();
