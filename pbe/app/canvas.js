// The body of a function that Gradio calls once: it gives element, props, trigger and watch.

const tools = element.querySelector(".bar").dataset.tools.split(" "), crops = tools.includes("crop");
const all = (selector) => [...element.querySelectorAll(selector)];
const canvas = element.querySelector("canvas"), screen = canvas.getContext("2d");
const mask = document.createElement("canvas"), paint = mask.getContext("2d");
const size = element.querySelector("input");
const COLOUR = "rgb(79, 70, 229)";
let tool, picture, drawn = false, box = null, hover = null, last = null, past = [];

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
  past = value && picture?.src === value.picture ? [...past.slice(-19), pixels()] : [];  // drawn by `select`: to undo
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
    picture = image;
    drawn = Boolean(value.mask);
    draw();
  });
}

// --- drawing

function at(event) {
  const on = canvas.getBoundingClientRect();
  return [(event.clientX - on.left) * canvas.width / on.width, (event.clientY - on.top) * canvas.height / on.height];
}
const pixels = () => paint.getImageData(0, 0, mask.width, mask.height);
function remember() {
  past = [...past.slice(-19), pixels()];
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

canvas.addEventListener("pointerdown", (event) => {
  if (!picture || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  remember();
  last = at(event);
  if (tool === "brush" || tool === "eraser") stroke(last, last); else box = [...last, 0, 0];
  draw();
});
canvas.addEventListener("pointermove", (event) => {
  hover = at(event);
  if (last && box) box = [...last, hover[0] - last[0], hover[1] - last[1]];
  else if (last) { stroke(last, hover); last = hover; }
  draw();
});
canvas.addEventListener("pointerup", () => {
  if (!last) return;
  if (box && tool === "select") { select(...box); last = box = null; draw(); return; }
  if (box) {
    if (crops) clear();
    paint.globalCompositeOperation = "source-over";
    if (box[2] && box[3]) paint.fillRect(...box.map(Math.round));
  }
  last = box = null;
  publish();
  draw();
});
canvas.addEventListener("pointerleave", () => { hover = null; draw(); });

// --- select: Python finds the object at a click or in a rough box, and draws it

function select(x, y, w, h) {
  past.pop();  // nothing is drawn yet
  const corners = [[Math.min(x, x + w), Math.min(y, y + h)], [Math.max(x, x + w), Math.max(y, y + h)]];
  const isClick = Math.hypot(w, h) < 0.01 * Math.hypot(canvas.width, canvas.height);
  const at = (isClick ? [[x, y]] : corners).flatMap(([x, y]) => [x / canvas.width, y / canvas.height]);
  trigger("select", { at });
}

const acts = {
  undo() { if (past.length) paint.putImageData(past.pop(), 0, 0); publish(); draw(); },
  reset() { remember(); clear(); publish(); draw(); },
  close() { trigger("close"); },
};
all("[data-act]").forEach((b) => b.addEventListener("click", () => acts[b.dataset.act]()));
all("[data-tool]").forEach((b) => {
  b.classList.toggle("absent", !tools.includes(b.dataset.tool) || tools.length === 1);
  b.addEventListener("click", () => choose(b.dataset.tool));
});
size.classList.toggle("absent", !tools.includes("brush"));
choose(tools[0]);
watch("value", load);
load();
