// SPDX-License-Identifier: Apache-2.0
// The page of the service: sends an image, shows its classes. It talks to its own origin only.
"use strict";

const $ = (id) => document.getElementById(id);
const STAGES = [["decode", "Decoding"], ["queue", "Waiting"], ["run", "Network"], ["encode", "Encoding"]];
const MAX_RETRIES = 5;

let result = null; // the JSON of the image on show
let labels = null; // class ids, row by row; 65535 where no class is set
let hidden = new Set(); // ids of classes that are switched off
let token = "";
let stream = null;
let pending = null; // AbortController of the request under way
let lastFile = null; // what was sent last, to send it again with a token
let shownFile = null; // whose result is on show, and is saved

function showStatus(text) { $("status").textContent = text; }

function showError(text) {
  $("error").textContent = text;
  $("error").hidden = !text;
}

// ---- sending

async function segment(file) {
  lastFile = file;
  pending?.abort();
  const request = pending = new AbortController();
  showError("");
  $("token-form").hidden = true;
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    if (request !== pending) return;
    $("busy").hidden = true;
    pending = null;
    showStatus("");
    showError(`${file.name || "This file"} is not an image this browser can read.`);
    return;
  }
  if (request !== pending) return;
  $("busy").hidden = false;
  showStatus("Segmenting…");
  try {
    const started = performance.now();
    const response = await (await send(file, "application/json", request.signal)).json();
    const arrived = performance.now();
    if (request !== pending) return;
    shownFile = file;
    show(response, bitmap, file.name || "camera photo", arrived - started);
  } catch (error) {
    if (error.name !== "AbortError" && request === pending) {
      showStatus("");
      if (error.status === 401) { $("token-form").hidden = false; $("token").focus(); }
      showError(error.status ? error.message : "The service does not respond. Is it still running?");
    }
  } finally {
    bitmap.close();
    if (request === pending) { $("busy").hidden = true; pending = null; }
  }
}

async function send(file, type, signal) {
  const headers = { "Accept": type, "Content-Type": "application/octet-stream" };
  if (token) headers.Authorization = `Bearer ${token}`;
  for (let attempt = 0; ; attempt += 1) {
    const response = await fetch("v1/segment", { method: "POST", body: file, headers, signal });
    if (response.ok) return response;
    const seconds = Number(response.headers.get("Retry-After"));
    if (seconds && attempt < MAX_RETRIES) {
      showStatus(`The service is busy; trying again in ${seconds} s…`);
      await new Promise((done) => setTimeout(done, seconds * 1000));
      signal?.throwIfAborted();
      continue;
    }
    const reason = await response.json().catch(() => ({}));
    throw Object.assign(new Error(reason.error || `The service responded with status ${response.status}.`), { status: response.status });
  }
}

// ---- showing

// Run lengths go down the columns, outside and inside the class in turn.
function unpack(data) {
  const { width, height } = data;
  const ids = new Uint16Array(width * height).fill(65535);
  for (const entry of data.classes) {
    let at = 0;
    entry.rle.counts.forEach((count, index) => {
      if (index % 2) {
        for (let i = at; i < at + count; i += 1) ids[(i % height) * width + Math.floor(i / height)] = entry.id;
      }
      at += count;
    });
  }
  return ids;
}

function show(data, bitmap, name, total) {
  result = data;
  labels = unpack(data);
  hidden = new Set();
  for (const id of ["image", "overlay"]) { $(id).width = data.width; $(id).height = data.height; }
  $("image").parentElement.style.setProperty("--ratio", data.width / data.height);
  $("image").getContext("2d").drawImage(bitmap, 0, 0, data.width, data.height);
  const summary = data.classes.map((entry) => `${entry.class} ${percent(entry.share)}`).join(", ");
  $("image").setAttribute("aria-label", `${name}, segmented: ${summary}`);
  $("caption").textContent = `${name} · ${data.width} × ${data.height}`;
  $("model").textContent = data.model;
  $("invitation").hidden = true;
  for (const id of ["result", "panel", "save", "save-labels", "save-json"]) $(id).hidden = false;
  $("drop").classList.add("filled");
  legend();
  timing(data, total);
  paint();
  showStatus(`Done in ${Math.round(total)} ms: ${summary}.`);
}

function percent(share) { return `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`; }

function legend() {
  const items = result.classes.map((entry) => {
    const color = `rgb(${entry.color.join(" ")})`;
    const box = make("input", { type: "checkbox", checked: true, value: entry.id });
    box.dataset.class = entry.class;
    box.addEventListener("change", () => toggle(entry.id, box.checked));
    const swatch = make("span", { className: "swatch" });
    const fill = make("span", {});
    // Set through the style object: the page's policy forbids style attributes.
    swatch.style.background = fill.style.background = color;
    fill.style.width = `${entry.share * 100}%`;
    const bar = make("span", { className: "bar" }, fill);
    bar.setAttribute("aria-hidden", "true");
    const name = make("span", { textContent: entry.class });
    const share = make("span", { className: "share", textContent: percent(entry.share) });
    return make("li", {}, make("label", {}, box, swatch, name, share, bar));
  });
  $("classes").replaceChildren(...items);
}

function timing(data, total) {
  const known = STAGES.filter(([stage]) => stage in data.timing_ms);
  const inside = known.reduce((sum, [stage]) => sum + data.timing_ms[stage], 0);
  const rows = known.map(([stage, name]) => [name, data.timing_ms[stage], ""]);
  rows.push(["Sending and reading", Math.max(total - inside, 0), ""], ["Total", total, "total"]);
  $("timing").replaceChildren(...rows.flatMap(([name, value, kind]) => [
    make("dt", { textContent: name, className: kind }),
    make("dd", { textContent: `${value.toFixed(value < 10 ? 1 : 0)} ms`, className: kind }),
  ]));
}

function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function toggle(id, shown) {
  if (shown) hidden.delete(id); else hidden.add(id);
  paint();
}

function paint() {
  const context = $("overlay").getContext("2d");
  const image = context.createImageData(result.width, result.height);
  const pixels = new Uint32Array(image.data.buffer);
  const colors = new Uint32Array(65536); // RGBA as the bytes lie in memory; transparent unless shown
  const bytes = new Uint8Array(colors.buffer);
  for (const entry of result.classes) {
    if (!hidden.has(entry.id)) bytes.set([...entry.color, 255], entry.id * 4);
  }
  for (let i = 0; i < labels.length; i += 1) pixels[i] = colors[labels[i]];
  context.putImageData(image, 0, 0);
}

function fade() {
  const value = $("opacity").value;
  $("overlay").style.opacity = value / 100;
  $("opacity-value").textContent = `${value} %`;
  $("opacity").setAttribute("aria-valuetext", `${value} percent`);
}

function point(event) {
  if (!result) return;
  const box = $("overlay").getBoundingClientRect();
  const x = Math.min(Math.floor((event.clientX - box.left) / box.width * result.width), result.width - 1);
  const y = Math.min(Math.floor((event.clientY - box.top) / box.height * result.height), result.height - 1);
  const entry = result.classes.find(({ id }) => id === labels[y * result.width + x]);
  $("under").textContent = entry ? entry.class : "";
  $("under").hidden = !entry;
}

function save() {
  const canvas = make("canvas", { width: result.width, height: result.height });
  const context = canvas.getContext("2d");
  context.drawImage($("image"), 0, 0);
  context.globalAlpha = $("opacity").value / 100;
  context.drawImage($("overlay"), 0, 0);
  canvas.toBlob((blob) => download(blob, "overlay.png"), "image/png");
}

// The class ids as the service writes them: a canvas would save colours.
async function saveLabels() {
  try {
    download(await (await send(shownFile, "image/png")).blob(), "labels.png");
  } catch (error) {
    showError(error.status ? error.message : "The service does not respond. Is it still running?");
  }
}

function saveJson() {
  download(new Blob([JSON.stringify(result, null, 1)], { type: "application/json" }), "labels.json");
}

function download(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: `${stem()}.${name}` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// What downloads are named after: the image's file without its ending.
function stem() { return (shownFile?.name || "photo").replace(/\.[^.]*$/, ""); }

// ---- camera

async function startCamera() {
  showError("");
  if (!navigator.mediaDevices?.getUserMedia) {
    showError("The browser gives the camera only to pages on this machine or over HTTPS.");
    return;
  }
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    showError(error.name === "NotAllowedError" ? "The camera was not allowed." : "No camera was found.");
    return;
  }
  $("video").srcObject = stream;
  camera(true);
  $("camera-take").focus();
}

function camera(on) {
  $("camera").hidden = $("camera-take").hidden = $("camera-stop").hidden = !on;
  $("camera-start").hidden = on;
  $("invitation").hidden = on || Boolean(result);
  $("result").hidden = on || !result;
}

function stopCamera() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  camera(false);
  $("camera-start").focus();
}

function takePhoto() {
  const video = $("video");
  if (!video.videoWidth) return;
  const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  stopCamera();
  canvas.toBlob((blob) => segment(blob), "image/jpeg", 0.92);
}

// ---- wiring

function pick(files) {
  const file = [...(files || [])].find(({ type }) => type.startsWith("image/"));
  if (file) segment(file);
  else if (files?.length) showError("That file is not an image.");
}

$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { pick($("file").files); $("file").value = ""; });
$("opacity").addEventListener("input", fade);
$("overlay").addEventListener("pointermove", point);
$("overlay").addEventListener("pointerleave", () => { $("under").hidden = true; });
$("save").addEventListener("click", save);
$("save-labels").addEventListener("click", saveLabels);
$("save-json").addEventListener("click", saveJson);
$("camera-start").addEventListener("click", startCamera);
$("camera-take").addEventListener("click", takePhoto);
$("camera-stop").addEventListener("click", stopCamera);
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  if (lastFile) segment(lastFile);
});
for (const [id, shown] of [["all", true], ["none", false]]) {
  $(id).addEventListener("click", () => {
    hidden = new Set(shown ? [] : result.classes.map((entry) => entry.id));
    for (const box of $("classes").querySelectorAll("input")) box.checked = shown;
    paint();
  });
}
document.addEventListener("paste", (event) => pick(event.clipboardData?.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("drop").classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  pick(event.dataTransfer?.files);
});
fade();
