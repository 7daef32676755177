// What a visitor does: draws or drops an image, and sees the student's answer. `student`, `known` and `reading` stand before it.
// Brings an image to the student's input as Pillow does, to the bit: the middle box (in float32), by a filter wide enough to leave nothing out.
function kernel(name, x) {
  x = Math.abs(x);
  if (name === "bilinear") return x < 1 ? 1 - x : 0;
  return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}
function taps(size, from, to, out, name) {
  const scale = Math.fround(to - from) / out, wide = Math.max(scale, 1), support = (name === "bilinear" ? 1 : 2) * wide;
  return Array.from({length: out}, (_, i) => {
    const centre = from + (i + 0.5) * scale, first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(size, Math.trunc(centre + support + 0.5)), found = [];
    for (let x = first; x < last; x++) found.push(kernel(name, (x - centre + 0.5) / wide));
    const sum = found.reduce((a, b) => a + b, 0);
    return [first, found.map(k => k / sum).map(k => Math.trunc(k * 4194304 + (k < 0 ? -0.5 : 0.5)))];
  });
}
const byte = sum => Math.min(255, Math.max(0, Math.floor((sum + 2097152) / 4194304)));
function pass(pixels, width, height, taps) {  // resizes the rows
  const out = new Uint8Array(taps.length * height);
  for (let y = 0; y < height; y++) taps.forEach(([first, ks], x) => {
    let sum = 0;
    for (let k = 0; k < ks.length; k++) sum += pixels[y * width + first + k] * ks[k];
    out[y * taps.length + x] = byte(sum);
  });
  return out;
}
function turned(pixels, width, height) {
  const out = new Uint8Array(pixels.length);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) out[x * height + y] = pixels[y * width + x];
  return out;
}
function resized(pixels, [width, height], [left, top, right, bottom], [w, h], name) {  // across, then down; rounded between
  const reach = Math.ceil((name === "bilinear" ? 1 : 2) * Math.max((bottom - top) / h, 1)) + 1;
  const first = Math.max(0, Math.floor(top) - reach), rows = Math.min(height, Math.ceil(bottom) + reach) - first;
  const across = taps(width, ...[left, right].map(Math.fround), w, name), down = taps(rows, ...[top - first, bottom - first].map(Math.fround), h, name);
  return turned(pass(turned(pass(pixels.subarray(first * width, (first + rows) * width), width, rows, across), w, rows), rows, w, down), h, w);
}
function brought(rgba, width, height) {  // RGBA of a canvas => the student's pixels, channel by channel
  const [channels, h, w] = student.shape, planes = [0, 1, 2].map(() => new Uint8Array(width * height));
  for (let i = 0; i < width * height; i++) {
    const alpha = rgba[4 * i + 3];
    for (let c = 0; c < 3; c++) {
      const over = 128 * (rgba[4 * i + c] * alpha + reading.background[c] * (255 - alpha)) + 16384;
      planes[c][i] = (over + (over >> 8)) >> 15;
    }
  }
  const grey = ([r, g, b]) => (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16;
  const used = channels === 3 ? planes : [planes[0].map((r, i) => grey([r, planes[1][i], planes[2][i]]))];
  const scale = Math.min(width / w, height / h) * reading.crop, left = Math.max(0, (width - scale * w) / 2), top = Math.max(0, (height - scale * h) / 2);
  const box = reading.fit !== "crop" ? [0, 0, width, height] : [left, top, Math.min(left + scale * w, width), Math.min(top + scale * h, height)];
  // A padded image fits inside, in the middle of the background.
  const inside = Math.min(w / width, h / height), within = side => Math.max(1, Math.floor(side * inside + 0.5));
  const [across, down] = reading.fit === "pad" ? [within(width), within(height)] : [w, h], x = Math.floor((w - across) / 2), y = Math.floor((h - down) / 2);
  const out = new Uint8Array(channels * h * w);
  used.forEach((plane, c) => {
    const pixels = resized(plane, [width, height], box, [across, down], reading.filter);
    out.fill(channels === 3 ? reading.background[c] : grey(reading.background), c * h * w, (c + 1) * h * w);
    for (let row = 0; row < down; row++) out.set(pixels.subarray(row * across, (row + 1) * across), c * h * w + (y + row) * w + x);
  });
  return out;
}
function answer(pixels) {  // => [[class, probability], ...], the likeliest first
  const logits = Array.from(student(pixels)), most = Math.max(...logits), sum = logits.reduce((a, b) => a + Math.exp(b - most), 0);
  return logits.map((value, i) => [student.classes[i], Math.exp(value - most) / sum]).sort((a, b) => b[1] - a[1]);
}
function show(pixels, canvas) {
  const [channels, h, w] = student.shape, image = new ImageData(w, h);
  for (let i = 0; i < h * w; i++) image.data.set([0, 1, 2].map(c => pixels[(channels === 3 ? c : 0) * h * w + i]).concat(255), 4 * i);
  canvas.width = w; canvas.height = h;
  canvas.getContext("2d").putImageData(image, 0, 0);
}
function play(root) {
  const seen = root.querySelector(".seen"), bars = root.querySelector(".bars"), said = root.querySelector(".said");
  const ask = (pixels, note = "") => {
    const before = performance.now(), found = answer(pixels), time = performance.now() - before;
    show(pixels, seen);
    const order = found.length > 10 ? found.slice(0, 10) : student.classes.map(name => found.find(one => one[0] === name));
    bars.replaceChildren(...order.map(([name, share]) => {
      const row = document.createElement("div"), label = document.createElement("span"), bar = document.createElement("i");
      label.textContent = name; bar.style.width = `${100 * share}%`; bar.title = `${(100 * share).toFixed(2)} %`;
      row.append(label, bar);
      return row;
    }));
    said.textContent = `${found[0][0]} (${(100 * found[0][1]).toFixed(1)} %), in ${time.toFixed(2)} ms${note}`;
  };
  const board = root.querySelector(".board"), pen = board && board.getContext("2d", {willReadFrequently: true});
  if (board) {
    const clear = () => { pen.fillStyle = "#000"; pen.fillRect(0, 0, board.width, board.height); };
    const drawn = () => {
      const size = board.width, data = pen.getImageData(0, 0, size, size).data;
      let [left, top, right, bottom, weight, x, y] = [size, size, 0, 0, 0, 0, 0];
      for (let i = 0; i < size * size; i++) if (data[4 * i]) {
        const a = i % size, b = Math.floor(i / size);
        left = Math.min(left, a); right = Math.max(right, a + 1); top = Math.min(top, b); bottom = Math.max(bottom, b + 1);
        weight += data[4 * i]; x += a * data[4 * i]; y += b * data[4 * i];
      }
      if (!weight) return;
      // As MNIST's digits were made: the drawing fits a part of the image (20 of 28 pixels there), its centre of mass is the image's.
      const side = Math.max(right - left, bottom - top) / reading.ink;
      const from = (centre, low, high) => Math.max(high - side, Math.min(low, centre - side / 2));  // nothing is cut off
      const inner = document.createElement("canvas").getContext("2d");
      inner.canvas.width = inner.canvas.height = size;
      inner.fillRect(0, 0, size, size);
      inner.drawImage(board, from(x / weight, left, right), from(y / weight, top, bottom), side, side, 0, 0, size, size);
      ask(brought(inner.getImageData(0, 0, size, size).data, size, size));
    };
    let last = null;
    const at = event => { const box = board.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top].map(v => v * board.width / box.width); };
    const stroke = event => {
      if (!last) return;
      pen.strokeStyle = "#fff"; pen.lineWidth = board.width / 13; pen.lineCap = pen.lineJoin = "round";
      pen.beginPath(); pen.moveTo(...last); pen.lineTo(...(last = at(event))); pen.stroke();
      drawn();
    };
    board.addEventListener("pointerdown", event => { board.setPointerCapture(event.pointerId); last = at(event); stroke(event); });
    board.addEventListener("pointermove", stroke);
    board.addEventListener("pointerup", () => { last = null; });
    root.querySelector(".clear").addEventListener("click", clear);
    clear();
  }
  const take = async file => {
    const picture = await createImageBitmap(file).catch(() => null);
    if (!picture) { said.textContent = `${file.name}: is no image that this browser can read`; return; }
    const canvas = document.createElement("canvas");
    canvas.width = picture.width; canvas.height = picture.height;
    const inner = canvas.getContext("2d");
    inner.drawImage(picture, 0, 0);
    ask(brought(inner.getImageData(0, 0, canvas.width, canvas.height).data, canvas.width, canvas.height), `: ${file.name}`);
  };
  const chosen = root.querySelector("input[type=file]");
  chosen.addEventListener("change", () => chosen.files[0] && take(chosen.files[0]));
  root.addEventListener("dragover", event => event.preventDefault());
  root.addEventListener("drop", event => { event.preventDefault(); if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]); });
  root.querySelector(".known").append(...known.map(one => {
    const button = document.createElement("button"), canvas = document.createElement("canvas"), text = document.createElement("small");
    show(base64(one.pixels), canvas);
    text.textContent = [one.label, one.teacher && `teacher: ${one.teacher}`].filter(Boolean).join(" · ");
    button.append(canvas, text);
    button.addEventListener("click", () => ask(base64(one.pixels), one.teacher ? `; the teacher says ${one.teacher}` : ""));
    return button;
  }));
  const apart = student.check();
  if (known.length) ask(base64(known[0].pixels), known[0].teacher ? `; the teacher says ${known[0].teacher}` : "");
  root.querySelector(".check").textContent = apart < 1e-3 ? `Self-check passed: its logits are ${apart.toExponential(1)} from the original's.`
    : `Self-check FAILED: its logits are ${apart} from the original's.`;
}
